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

/// What one round of a benchmark prints, and its report.
fn one_round(what: &str, arguments: &[&str]) -> (String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_qos-bench"))
        .args([what, "--rounds", "1", "--json"])
        .arg(&file)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    (text, serde_json::from_slice(&fs::read(&file).unwrap()).unwrap())
}

/// The report of one round of `qos-bench classify`.
fn classify(arguments: &[&str]) -> Value {
    let (text, report) = one_round("classify", arguments);
    assert!(text.contains("answers compared") && text.contains("| ≤ 0.12"), "{text}");
    report
}

#[test]
fn the_classifier_is_measured_and_every_answer_is_right() {
    let report = classify(&["--count", "2000"]);
    assert_eq!((&report["rules"], &report["mismatches"]), (&Value::from(2_000), &Value::from(0)), "{report}");
    assert_eq!(report["compared"], 200_000);
    for traffic in ["hot", "uniform", "flood", "cold"] {
        assert!(report[format!("empty_{traffic}_ns")].as_f64().unwrap() > 0.0, "{report}");
        for subject in ["lpm", "hash", "classify", "path"] {
            // One round over another: less than nothing, where the machine stopped in the other.
            assert!(report[format!("{subject}_{traffic}_ns")].is_number(), "{report}");
        }
    }
    for key in ["empty_ns", "load_ms", "update_us_p50", "update_us_p99", "kernel_bytes"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
    }
    assert!(report["verified"]["qos_xdp_lan"].as_u64().unwrap() > 1_000, "{report}");
}

#[test]
fn an_ipv6_set_is_measured_beside_the_ipv4_one_it_is_made_of() {
    for plan in [&["--ipv6"][..], &["--ipv6", "nibbles"]] {
        let report = classify(&[&["--count", "500"], plan].concat());
        assert_eq!((&report["family"], &report["mismatches"]), (&"ipv6".into(), &0.into()), "{report}");
        for key in ["classify_uniform_ns", "lpm_uniform_ns", "hash_uniform_ns", "ipv4_classify_uniform_ns"] {
            assert!(report[key].is_number(), "{key}: {report}");
        }
        assert!(report["classify_uniform_of_ipv4"].is_number(), "{report}");
    }
}

/// Whether there is an `nft`; says so where there is none.
fn has_nft(test: &str) -> bool {
    let found = Command::new("nft").arg("--version").output().is_ok();
    if !found {
        qos_tests::skip::skip(test, "no `nft` (Debian package nftables)");
    }
    found
}

#[test]
fn a_rule_set_is_forwarded_through_by_qos_and_by_nftables() {
    let report = classify(&["--count", "500", "--forward"]);
    for key in ["forward_plain_pps", "forward_qos_pps", "forward_qos_lines_pps"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
    }
    if has_nft("a_rule_set_is_forwarded_through_by_qos_and_by_nftables") {
        assert!(report["forward_nft_pps"].as_f64().unwrap() > 0.0, "{report}");
        // All of its packets are of these rules, and few rules overlap.
        assert!(report["forward_nft_rules"].as_u64().unwrap() > 450, "{report}");
        assert!(report["forward_nft_matched"].as_f64().unwrap() > 0.9, "{report}");
    }
}

#[test]
fn growth_is_measured_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("growth.svg");
    let too_many = (qos_common::abi::MAX_RULES_RANGE.end() + 1).to_string();
    let counts = format!("10,300,{too_many}");
    let (text, report) = one_round("growth", &["--counts", &counts, "--svg", plot.to_str().unwrap()]);
    let points = report["points"].as_array().unwrap();
    let rules: Vec<_> = points.iter().map(|point| point["rules"].as_u64().unwrap()).collect();
    assert_eq!(rules, [10, 300], "{report}");
    assert!(text.contains("| 300 ") && text.contains("10 rules, over LPM"), "{text}");
    assert!(text.contains(&format!("skipped: {too_many} rules: the classifier takes ")), "{text}");
    let mut lines = 3;
    if has_nft("growth_is_measured_and_drawn") {
        assert!(points.iter().all(|point| point["nftables_matched"].as_f64().unwrap() > 0.9), "{report}");
        lines = 4;
    }
    for point in points {
        assert_eq!((&point["compared"], &point["mismatches"]), (&100_000.into(), &0.into()), "{report}");
    }
    let plot = fs::read_to_string(&plot).unwrap();
    assert!(plot.starts_with("<svg ") && plot.ends_with("</svg>\n"), "{plot}");
    let drawn = plot.lines().filter(|line| line.starts_with("<polyline") && line.contains(' ')).count();
    assert!(drawn >= lines && plot.contains(">nftables, concatenated set<"), "{plot}");
}

#[test]
fn decisions_grants_and_starts_are_measured() {
    let (text, report) = one_round("manager", &["--most", "1500"]);
    let core = report["core"].as_array().unwrap();
    let sizes: Vec<_> = core.iter().map(|core| core["allocations"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [1_000, 1_500], "{report}");
    for (of, keys) in [
        (&core[0], &["empty", "policed", "guaranteed", "refused", "revoked", "carried_out"][..]),
        (&report["policed"], &["per_second", "p50_ms", "p99_ms"]),
        (&report["guaranteed"], &["per_second", "p50_ms", "p99_ms"]),
        (&report["answered_policed"], &["median_ms", "p99_ms"]),
        (&report["start"], &["from_nothing", "taking_over"]),
        (&report, &["sqlite_per_second"]),
    ] {
        assert!(keys.iter().all(|key| of[key].as_f64().unwrap() > 0.0), "{keys:?}: {report}");
    }
    assert!(text.contains("grants a second, durable, policed") && text.contains("| ≥ 300000"), "{text}");
}

#[test]
fn nothing_to_measure_is_refused() {
    for arguments in
        [["classify", "--rounds"], ["classify", "--count"], ["datapath", "--rounds"], ["growth", "--counts"]]
    {
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
