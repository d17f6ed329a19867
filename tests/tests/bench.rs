//! The benchmark runs, and its figures are of what they say. Needs root.

#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

#[test]
fn boxes_are_measured_with_qos_and_without() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("boxes.json");
    let output = Command::new(env!("CARGO_BIN_EXE_qos-bench"))
        .args(["boxes", "--rounds", "1", "--only", "router-tc", "--only", "bridge-pppoe", "--json"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let figures = report["figures"].as_array().unwrap();
    let found: Vec<_> = figures
        .iter()
        .map(|figure| ["kind", "direction", "judged"].map(|key| figure[key].as_str().unwrap()))
        .map(|[kind, direction, judged]| (kind, direction, judged.split(", ").next().unwrap()))
        .collect();
    let expected = [
        ("router-tc", "up", "tc"),
        ("router-tc", "down", "tc"),
        ("bridge-pppoe", "up", "XDP native"),
        ("bridge-pppoe", "down", "XDP native"),
    ];
    assert_eq!(found, expected, "{text}");
    for figure in figures {
        let costs = figure["with_qos"].as_array().unwrap();
        assert_eq!(costs.len(), 3, "{figure}");
        for range in costs.iter().map(|cost| &cost["packets_per_second"]).chain([&figure["plain"]]) {
            assert!(range["median"].as_f64().unwrap() > 0.0, "{figure}");
        }
        assert!(text.contains(figure["judged"].as_str().unwrap()), "{text}");
    }
    assert_eq!(report["skipped"], Value::Array(Vec::new()));
}

/// The report of one round of `qos-bench classify`.
fn classify(arguments: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("classify.json");
    let output = Command::new(env!("CARGO_BIN_EXE_qos-bench"))
        .args(["classify", "--rounds", "1", "--json"])
        .arg(&file)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("answers compared") && text.contains("| ≤ 0.12"), "{text}");
    serde_json::from_slice(&fs::read(&file).unwrap()).unwrap()
}

#[test]
fn the_classifier_is_measured_and_every_answer_is_right() {
    let report = classify(&["--count", "2000"]);
    assert_eq!((&report["rules"], &report["mismatches"]), (&Value::from(2_000), &Value::from(0)), "{report}");
    assert_eq!(report["compared"], 200_000);
    for subject in ["empty", "lpm", "hash", "classify", "path"] {
        for traffic in ["hot", "uniform", "flood", "cold"] {
            assert!(report[format!("{subject}_{traffic}_ns")].as_f64().unwrap() > 0.0, "{report}");
        }
    }
    for key in ["empty_ns", "load_ms", "update_us_p50", "update_us_p99", "kernel_bytes"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
    }
    assert!(report["verified"]["qos_xdp_lan"].as_u64().unwrap() > 1_000, "{report}");
}

#[test]
fn nothing_to_measure_is_refused() {
    for arguments in [["classify", "--rounds"], ["classify", "--count"], ["datapath", "--rounds"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qos-bench"));
        let output = command.args(arguments).arg("0").stdin(Stdio::null()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(arguments[1]) && error.contains("0 is not in 1.."), "{arguments:?}: {error}");
    }
}

#[test]
fn shared_rule_sets_are_classified_as_by_a_linear_search() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/classbench"));
    if !folder.exists() {
        qos_tests::skip::skip(
            "shared_rule_sets_are_classified_as_by_a_linear_search",
            "there are no shared rule sets",
        );
        return;
    }
    for set in ["acl1_1000", "ipc1_1000", "fw1_1000"] {
        let [rules, trace] = ["rules", "trace"].map(|what| folder.join(format!("{set}.{what}.gz")));
        let report = classify(&["--rules", rules.to_str().unwrap(), "--trace", trace.to_str().unwrap()]);
        assert!(report["compared"].as_u64().unwrap() > 200_000, "{set}: {report}");
        assert_eq!(report["mismatches"], 0, "{set}: {report}");
    }
}
