//! The program as a shell sees it.

use std::process::{Command, Output, Stdio};

use obol::ledger::{DeviceInfo, Ledger, OpenOptions, RateCard};
use obol::units::UnixNanos;

fn empty_ledger() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "test".into() };
    let rate = RateCard::parse("1", "0.2", "USD", None).expect("a rate card");
    let options = OpenOptions::one(device, rate, UnixNanos(1), "boot".into());
    let (ledger, reports) = Ledger::open(dir.path(), &options).expect("a ledger");
    drop(reports);
    ledger.close().expect("closes");
    dir
}

fn obol(arguments: &[&str], dir: &tempfile::TempDir, out: Stdio) -> Output {
    Command::new(env!("CARGO_BIN_EXE_obol"))
        .args(arguments)
        .arg("--data-dir")
        .arg(dir.path())
        .current_dir(dir.path())
        .stdout(out)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .expect("the program runs")
}

#[test]
fn audit_and_report_read_a_ledger_and_say_so_by_exit_code() {
    let dir = empty_ledger();
    let audit = obol(&["audit"], &dir, Stdio::piped());
    assert!(audit.status.success());
    assert!(String::from_utf8_lossy(&audit.stdout).starts_with("reconciled: difference 0"));
    assert!(obol(&["report", "--json"], &dir, Stdio::piped()).status.success());
    assert_eq!(obol(&["report", "--by", "colour"], &dir, Stdio::piped()).status.code(), Some(2));
    let nothing = tempfile::tempdir().expect("a directory");
    let missing = obol(&["audit"], &nothing, Stdio::piped());
    assert_eq!(missing.status.code(), Some(1));
    assert!(!missing.stderr.is_empty(), "it says why");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let dir = empty_ledger();
    for arguments in [&["audit"][..], &["report"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = obol(arguments, &dir, writer.into());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !said.contains("panicked"), "{arguments:?}: {said}");
    }
}

#[test]
fn a_wrong_precision_is_refused_with_the_choices() {
    let dir = tempfile::tempdir().expect("a directory");
    for (flag, value, choices) in [
        ("--quant", "q4", "file, f32, f16, bf16, int8 or int4"),
        ("--kv-dtype", "fp8", "f16, bf16, f32 or int8"),
    ] {
        let output = obol(&["serve", flag, value], &dir, Stdio::piped());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(value) && said.contains(choices), "{said}");
    }
}
