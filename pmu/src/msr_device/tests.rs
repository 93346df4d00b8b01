//! A sparse file stands in for the device: like the driver, it holds 8 bytes at the offset of an MSR's number (MSRs closer than 8 overlap
//! in it, so tests use distant ones).

use super::*;
use std::io::Write;

fn shape(text: &str) -> Shape {
    text.parse().unwrap()
}

fn device(text: &str) -> (tempfile::NamedTempFile, MsrDevice) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0xC002_0000).unwrap();
    let device = MsrDevice::open_path(file.path(), shape(text)).unwrap();
    (file, device)
}

#[test]
fn an_access_is_eight_little_endian_bytes_at_the_msrs_number() {
    let (file, mut device) = device("intel:v5:8+4:48");
    device.wrmsr(0x38F, 0x0102_0304_0506_0708).unwrap();
    let mut bytes = [0; 10];
    file.as_file().read_exact_at(&mut bytes, 0x38E).unwrap();
    assert_eq!(bytes, [0, 8, 7, 6, 5, 4, 3, 2, 1, 0]);
    assert_eq!(device.rdmsr(0x38F), Ok(0x0102_0304_0506_0708));
    device.wrmsr(0xC001_0200, 7).unwrap();
    assert_eq!(device.rdmsr(0xC001_0200), Ok(7), "numbers above 2^31 are offsets, too");
}

#[test]
fn a_counter_is_read_at_its_msr() {
    let (_file, mut intel) = device("intel:v5:8+4:48");
    for (index, msr) in [(0, 0xC1), (7, 0xC8), (1 << 30, 0x309), (1 << 30 | 3, 0x30C)] {
        intel.wrmsr(msr, 0x1234 + u64::from(index)).unwrap();
        assert_eq!(intel.rdpmc(index), Ok(0x1234 + u64::from(index)), "{index:#x}");
    }
    let (_file, mut amd) = device("amd:v2:6:48");
    amd.wrmsr(0xC001_020B, 99).unwrap();
    assert_eq!(amd.rdpmc(5), Ok(99));
    let (_file, mut k7) = device("amd:v0:4:48");
    k7.wrmsr(0xC001_0007, 98).unwrap();
    assert_eq!(k7.rdpmc(3), Ok(98));
}

#[test]
fn an_index_that_rdpmc_would_refuse_faults_without_touching_the_device() {
    for (text, indices) in [
        ("intel:v5:8+4:48", vec![8, 64, 1 << 30 | 4, 1 << 29, 1 << 31, u32::MAX]),
        ("intel:v5:0xb5+0xb:48", vec![1, 3, 1 << 30 | 2]),
        ("amd:v2:6:48", vec![6, 10, 1 << 30, 1 << 29]),
    ] {
        let (_file, mut device) = device(text);
        for index in indices {
            assert_eq!(device.rdpmc(index), Err(HwError::Fault), "{text} {index:#x}");
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0x1000).unwrap();
    let metrics = Shape { perf_capabilities: CAP_PERF_METRICS, ..shape("intel:v5:8+4:48") };
    let mut device = MsrDevice::open_path(file.path(), metrics).unwrap();
    device.wrmsr(MSR_PERF_METRICS, 5).unwrap();
    assert_eq!(device.rdpmc(1 << 29), Ok(5));
}

#[test]
fn errors_are_typed() {
    assert_eq!(access(&io::Error::from_raw_os_error(5)), HwError::Fault, "EIO is #GP");
    for errno in [1, 6, 13] {
        assert_eq!(
            access(&io::Error::from_raw_os_error(errno)),
            HwError::Io(errno),
            "EPERM, ENXIO (core offline), EACCES"
        );
    }
    // A short file: the read ends early.
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0; 0x390]).unwrap();
    let mut device = MsrDevice::open_path(file.path(), shape("intel:v5:8+4:48")).unwrap();
    assert_eq!(device.rdmsr(0x38F), Err(HwError::Io(0)));
    assert_eq!(device.rdmsr(0x345), Ok(0));
}

#[test]
fn a_full_device_reports_its_errno() {
    let mut device = MsrDevice::open_path(Path::new("/dev/full"), shape("intel:v5:8+4:48")).unwrap();
    assert_eq!(device.wrmsr(0x38F, 0), Err(HwError::Io(28)), "ENOSPC");
}

#[test]
fn i17_an_access_from_another_core_is_refused() {
    let (_file, mut device) = device("intel:v5:8+4:48");
    device.core = Some(u32::MAX - 1);
    let here = |error| matches!(error, HwError::WrongCore { expected, .. } if expected == u32::MAX - 1);
    assert!(here(device.rdmsr(0x38F).unwrap_err()));
    assert!(here(device.wrmsr(0x38F, 1).unwrap_err()));
    assert!(here(device.rdpmc(0).unwrap_err()));
    device.core = None;
    assert_eq!(device.rdmsr(0x38F), Ok(0), "nothing was written");
}

#[test]
fn opening_says_what_to_do() {
    let error = MsrDevice::open_path(Path::new("/nonexistent/msr"), shape("amd:v2:6:48")).unwrap_err();
    assert_eq!(error.reason(), "MSR_DEVICE_ABSENT");
    assert!(error.to_string().contains("modprobe msr") && error.to_string().contains("/nonexistent/msr"));
    let absent = MsrDevice::open(u32::MAX, shape("amd:v2:6:48")).unwrap_err();
    assert_eq!(absent.path, "/dev/cpu/4294967295/msr");
}

fn good() -> Preconditions {
    Preconditions {
        core: 3,
        nmi_watchdog: Some(false),
        perf_events: Some(vec![]),
        msr_allow_writes: Some("on".into()),
        control_after_zero: Some([0, 0]),
        pebs_enable: Some(0),
        ds_area: Some(0),
        debug_control: Some(1),
        status_after_reset: Some(1 << 63),
        rdpmc: Some(1),
        isolated: Some(true),
        v6_configuration: Some(vec![]),
    }
}

#[test]
fn i24_a_core_is_taken_only_when_every_precondition_is_proven() {
    assert_eq!(check(&good()), []);
    type Spoil = fn(&mut Preconditions);
    let cases: [(&str, Spoil, Spoil); 11] = [
        ("nmi_watchdog", |p| p.nmi_watchdog = Some(true), |p| p.nmi_watchdog = None),
        (
            "perf_events",
            |p| p.perf_events = Some(vec!["perf record (pid 7)".into()]),
            |p| p.perf_events = None,
        ),
        ("msr_allow_writes", |p| p.msr_allow_writes = Some("default".into()), |p| p.msr_allow_writes = None),
        (
            "foreign_writer",
            |p| p.control_after_zero = Some([0, 0x7_0000_000F]),
            |p| p.control_after_zero = None,
        ),
        ("pebs_enable", |p| p.pebs_enable = Some(1), |p| p.pebs_enable = None),
        ("ds_area", |p| p.ds_area = Some(0xFFFF_8000_0000_0000), |p| p.ds_area = None),
        ("freeze_bits", |p| p.debug_control = Some(1 << 12), |p| p.debug_control = None),
        ("status_freeze", |p| p.status_after_reset = Some(1 << 59), |p| p.status_after_reset = None),
        ("rdpmc", |p| p.rdpmc = Some(2), |p| p.rdpmc = None),
        ("isolated", |p| p.isolated = Some(false), |p| p.isolated = None),
        ("v6_configuration", |p| p.v6_configuration = Some(vec![(0x1902, 1)]), |p| p.v6_configuration = None),
    ];
    for (id, spoil, hide) in cases {
        for change in [spoil, hide] {
            let mut found = good();
            change(&mut found);
            let failures = check(&found);
            assert_eq!(failures.iter().map(|f| f.id).collect::<Vec<_>>(), [id]);
            assert!(!failures[0].message.is_empty() && !failures[0].remedy.is_empty());
        }
    }
}

#[test]
fn i24_every_failure_is_named_at_once() {
    let ids: Vec<&str> = check(&Preconditions::default()).iter().map(|f| f.id).collect();
    assert_eq!(
        ids,
        [
            "nmi_watchdog",
            "perf_events",
            "msr_allow_writes",
            "foreign_writer",
            "pebs_enable",
            "ds_area",
            "freeze_bits",
            "status_freeze",
            "rdpmc",
            "isolated",
            "v6_configuration",
        ]
    );
}
