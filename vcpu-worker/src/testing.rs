//! The rule for tests that need /dev/kvm: they run where it is; elsewhere they say that they are skipped, and fail
//! if `VPMU_REQUIRE_KVM=1` says that it must be there.

/// Whether a test that needs KVM can run here.
///
/// # Panics
/// If it cannot and `VPMU_REQUIRE_KVM=1`.
#[must_use = "return from the test when it is false"]
pub fn require_kvm() -> bool {
    let openable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !openable {
        println!("skipped: no /dev/kvm");
        let required = std::env::var_os("VPMU_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(!required, "VPMU_REQUIRE_KVM=1, but /dev/kvm cannot be opened");
    }
    openable
}
