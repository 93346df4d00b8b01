//! Resource names (AIP-122): the short name that people type and the full one on the wire.

/// The parent of every machine of a single host.
pub const DEFAULT_PROJECT: &str = "projects/default";

/// Full name of a virtual machine. A full name is passed through.
pub fn vm(name: &str) -> String {
    if name.starts_with("projects/") {
        name.to_owned()
    } else {
        format!("{DEFAULT_PROJECT}/virtualMachines/{name}")
    }
}

/// Full name of one migration of a machine. A full name is passed through.
pub fn migration(vm_name: &str, id: &str) -> String {
    if id.starts_with("projects/") { id.to_owned() } else { format!("{}/migrations/{id}", vm(vm_name)) }
}

/// Full name of an operation. A full name is passed through.
pub fn operation(id: &str) -> String {
    if id.starts_with("operations/") { id.to_owned() } else { format!("operations/{id}") }
}

/// The last part of a full name: what people type.
pub fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The machine's short name inside any full name below it.
pub fn vm_of(name: &str) -> &str {
    let mut parts = name.split('/');
    while let Some(part) = parts.next() {
        if part == "virtualMachines" {
            return parts.next().unwrap_or_default();
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_full_names_meet() {
        let full = vm("web-1");
        assert_eq!(full, "projects/default/virtualMachines/web-1");
        assert_eq!(vm(&full), full);
        assert_eq!(short(&full), "web-1");
        let migration = migration("web-1", "abc");
        assert_eq!(migration, "projects/default/virtualMachines/web-1/migrations/abc");
        assert_eq!((vm_of(&migration), short(&migration)), ("web-1", "abc"));
        assert_eq!(operation("u"), "operations/u");
        assert_eq!(operation("operations/u"), "operations/u");
        assert_eq!(vm_of("operations/u"), "");
    }
}
