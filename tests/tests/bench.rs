//! The benchmark runs, and its figures are of what they say. Needs root.

use std::fs;
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
