//! Resource names: `projects/{p}/virtualMachines/{vm}` and what hangs below it.
//!
//! Parsing bounds every part before it is used as a key; an id is 1 to 63 characters of [a-z0-9-], begins with a
//! letter and does not end with a hyphen (RFC 1035 label, AIP-122).

use std::fmt;

use crate::status::ApiError;

/// Project that an empty parent means.
pub const DEFAULT_PROJECT: &str = "default";

/// Full name of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName {
    project: String,
    vm: String,
}

impl VmName {
    /// From checked parts.
    pub fn new(project: &str, vm: &str) -> Result<Self, ApiError> {
        check_id("parent", project)?;
        check_id("virtual_machine_id", vm)?;
        Ok(Self { project: project.to_owned(), vm: vm.to_owned() })
    }

    /// Parses `projects/{p}/virtualMachines/{vm}`; `suffix` may follow it (`/pmu`), optionally.
    pub fn parse(field: &str, name: &str, suffix: &str) -> Result<Self, ApiError> {
        let bare = if suffix.is_empty() { name } else { name.strip_suffix(suffix).unwrap_or(name) };
        let bad = || {
            ApiError::invalid(
                field,
                name,
                "BAD_RESOURCE_NAME",
                "is not a virtual machine's name",
                "write projects/{project}/virtualMachines/{vm}, ids of 1 to 63 characters of [a-z0-9-] that start with a letter",
            )
        };
        let mut parts = bare.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("projects"), Some(project), Some("virtualMachines"), Some(vm), None)
                if is_id(project) && is_id(vm) =>
            {
                Ok(Self { project: project.to_owned(), vm: vm.to_owned() })
            }
            _ => Err(bad()),
        }
    }

    /// Project id.
    pub fn project(&self) -> &str {
        &self.project
    }

    /// Last part: the machine's id.
    pub fn vm(&self) -> &str {
        &self.vm
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "projects/{}/virtualMachines/{}", self.project, self.vm)
    }
}

/// Full name of a migration: its machine's name and a UUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationName {
    /// The machine.
    pub vm: VmName,
    /// The migration's UUID.
    pub id: uuid::Uuid,
}

impl MigrationName {
    /// Parses `projects/{p}/virtualMachines/{vm}/migrations/{uuid}`.
    pub fn parse(field: &str, name: &str) -> Result<Self, ApiError> {
        let parsed = name
            .split_once("/migrations/")
            .and_then(|(vm, id)| Some(Self { vm: VmName::parse(field, vm, "").ok()?, id: parse_uuid(id)? }));
        parsed.ok_or_else(|| {
            ApiError::invalid(
                field,
                name,
                "BAD_RESOURCE_NAME",
                "is not a migration's name",
                "write projects/{project}/virtualMachines/{vm}/migrations/{uuid}",
            )
        })
    }
}

impl fmt::Display for MigrationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/migrations/{}", self.vm, self.id)
    }
}

/// Parses `projects/{project}`; empty means the default project.
pub fn parse_project(field: &str, parent: &str) -> Result<String, ApiError> {
    if parent.is_empty() {
        return Ok(DEFAULT_PROJECT.to_owned());
    }
    match parent.strip_prefix("projects/") {
        Some(project) if is_id(project) => Ok(project.to_owned()),
        _ => Err(ApiError::invalid(
            field,
            parent,
            "BAD_RESOURCE_NAME",
            "is not a project's name",
            "write projects/{project}, or leave it empty for projects/default",
        )),
    }
}

/// Parses `operations/{uuid}`.
pub fn parse_operation(field: &str, name: &str) -> Result<uuid::Uuid, ApiError> {
    name.strip_prefix("operations/").and_then(parse_uuid).ok_or_else(|| {
        ApiError::invalid(
            field,
            name,
            "BAD_RESOURCE_NAME",
            "is not an operation's name",
            "write operations/{uuid} as the call that began it returned",
        )
    })
}

/// An optional request id: empty, or a UUID.
pub fn parse_request_id(id: &str) -> Result<Option<uuid::Uuid>, ApiError> {
    if id.is_empty() {
        return Ok(None);
    }
    parse_uuid(id).map(Some).ok_or_else(|| {
        ApiError::invalid(
            "request_id",
            id,
            "BAD_REQUEST_ID",
            "is not a UUID",
            "send a fresh random UUID (version 4), or leave it empty",
        )
    })
}

fn parse_uuid(text: &str) -> Option<uuid::Uuid> {
    // Hyphenated only: one spelling a resource.
    if text.len() == 36 { uuid::Uuid::try_parse(text).ok() } else { None }
}

fn check_id(field: &str, id: &str) -> Result<(), ApiError> {
    if is_id(id) {
        return Ok(());
    }
    Err(ApiError::invalid(
        field,
        id,
        "BAD_ID",
        "is not an id",
        "use 1 to 63 characters of [a-z0-9-], starting with a letter and not ending with a hyphen",
    ))
}

fn is_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.last().is_some_and(|b| *b != b'-')
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let name = VmName::parse("name", "projects/default/virtualMachines/web-1", "").expect("good name");
        assert_eq!(name.to_string(), "projects/default/virtualMachines/web-1");
        assert_eq!(VmName::parse("name", &format!("{name}/pmu"), "/pmu").expect("suffix"), name);
        let id = uuid::Uuid::new_v4();
        let migration = MigrationName::parse("name", &format!("{name}/migrations/{id}")).expect("migration");
        assert_eq!((migration.id, &migration.vm), (id, &name));
    }

    #[test]
    fn bad_names_are_typed_errors() {
        let long = format!("projects/default/virtualMachines/{}", "a".repeat(64));
        for bad in [
            "",
            "web",
            "projects//virtualMachines/a",
            "projects/default/virtualMachines/",
            "projects/default/virtualMachines/A",
            "projects/default/virtualMachines/a-",
            "projects/default/virtualMachines/-a",
            "projects/default/virtualMachines/a/b",
            "projects/default/virtualMachines/../x",
            "projects/default/virtualMachines/a\u{0}",
            &long,
        ] {
            let error = VmName::parse("name", bad, "").expect_err(bad);
            assert_eq!(error.reason(), "BAD_RESOURCE_NAME");
        }
        assert!(parse_request_id("not-a-uuid").is_err());
        assert!(parse_operation("name", "operations/1").is_err());
    }
}
