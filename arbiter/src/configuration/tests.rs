use super::*;
use nvshare::page::{ENDLESS, Quantum};
use nvshare::units::SECOND;
use proptest::prelude::*;

const GPU: GpuUuid = GpuUuid([3; 16]);

/// A configuration of arguments, variables and a file's text.
fn configuration(
    arguments: &[&str],
    variables: &[(&str, &str)],
    text: &str,
) -> Result<Configuration, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("nvshare.toml");
    std::fs::write(&file, text).unwrap();
    let matches = parse(std::iter::once("nvshare-arbiter").chain(arguments.iter().copied())).unwrap();
    let variable = |name: &str| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
    };
    Configuration::new(&matches, variable, &file)
}

fn quantum(configuration: &Configuration) -> (Quantum, String) {
    let name = configuration.name("quantum").unwrap();
    let origin = configuration.effective(name, None).1.to_string();
    (configuration.options(None).unwrap().settings().quantum, origin)
}

#[test]
fn an_argument_goes_before_a_variable_and_that_before_the_file() {
    let (argument, variable, file) =
        (&["--quantum", "1s"][..], &[("NVSHARE_ARBITER_QUANTUM", "2s")][..], "\nquantum = \"3s\"");
    let of = |arguments, variables, text| quantum(&configuration(arguments, variables, text).unwrap());
    assert_eq!(of(argument, variable, file), (Quantum::Fixed(SECOND), "--quantum".into()));
    assert_eq!(of(&[], variable, file), (Quantum::Fixed(2 * SECOND), "NVSHARE_ARBITER_QUANTUM".into()));
    let (fixed, origin) = of(&[], &[], file);
    assert!(fixed == Quantum::Fixed(3 * SECOND) && origin.ends_with("nvshare.toml:2"), "{origin}");
    assert_eq!(of(&[], &[("NVSHARE_ARBITER_QUANTUM", "")], ""), (Quantum::default(), "default".into()));
}

#[test]
fn every_setting_may_stand_in_the_file_and_in_its_variable() {
    let value = |name: &Name| match name.name.as_str() {
        "gpu" => "GPU-00000000-0000-0000-0000-000000000001".to_owned(),
        "anti-thrash" => "off".into(),
        "log-level" => "debug".into(),
        "log-format" => "json".into(),
        "listen" => "127.0.0.1:9400".into(),
        "slots-per-user" => "7".into(),
        name if name.starts_with("quantum-") && !name.ends_with("min") && !name.ends_with("max") => {
            "7".into()
        }
        "capacity" | "headroom" => "4GiB".into(),
        "runtime-dir" | "nvml-library" => "/somewhere".into(),
        _ if name.is_switch => "true".into(),
        _ => "7s".into(),
    };
    for name in names().iter().filter(|name| name.in_file) {
        let value = value(name);
        let in_file = match name.is_switch {
            true => format!("{} = {value}", name.name),
            false => format!("{} = \"{value}\"", name.name),
        };
        let variable = name.variable.clone().unwrap();
        let by_file = configuration(&[], &[], &in_file).unwrap();
        let by_variable = configuration(&[], &[(&variable, &value)], "").unwrap();
        assert_eq!(by_file.shown(name, None), value);
        assert_eq!(by_variable.shown(name, None), value);
        let options = by_file.options(None).unwrap();
        assert_eq!(format!("{options:?}"), format!("{:?}", by_variable.options(None).unwrap()));
        let usual = configuration(&[], &[], "").unwrap().options(None).unwrap();
        assert_ne!(format!("{options:?}"), format!("{usual:?}"), "{} changes nothing", name.name);
    }
}

#[test]
fn what_is_wrong_is_named_by_where_it_stands() {
    let said = configuration(&[], &[("NVSHARE_ARBITER_QUANTUM", "soon")], "").unwrap_err();
    assert!(said.starts_with("NVSHARE_ARBITER_QUANTUM: 'soon'"), "{said}");
    let said = configuration(&[], &[], "slots-per-user = 99\nanti-thrash = \"perhaps\"\ncapacity = \"1MiB\"")
        .unwrap_err();
    assert!(said.contains(":1:18: 99 is not in 1..=48"), "{said}");
    assert!(said.contains(":2:15: invalid value 'perhaps'") && said.contains("on, off"), "{said}");
    assert!(said.contains(":3:12: '1MiB' is no pool"), "{said}");
}

#[test]
fn a_private_arbiter_reads_only_a_file_that_is_named() {
    let private = ["--exit-when-idle", "--owner-pid", "1"];
    let configuration = configuration(&private, &[], "quantum = \"3s\"").unwrap();
    assert_eq!(quantum(&configuration).0, Quantum::default());
}

#[test]
fn a_file_that_is_named_must_be_there() {
    let matches = parse(["nvshare-arbiter", "--config", "/nonexistent/nvshare.toml"]).unwrap();
    let said = Configuration::new(&matches, |_| None, Path::new(FILE)).unwrap_err();
    assert!(said.contains("/nonexistent/nvshare.toml") && said.contains("NVSHARE_CONFIG"), "{said}");
}

fn set(pairs: &[(&str, &str)]) -> SettingsChange {
    SettingsChange::Set(pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
}

#[test]
fn what_is_asked_for_at_run_time_holds_for_a_gpu_or_for_all() {
    let mut configuration = configuration(&["--quantum", "1s"], &[], "").unwrap();
    configuration.request(Some(GPU), &set(&[("quantum", "2s")]), 0).unwrap();
    let of = |configuration: &Configuration, gpu| configuration.options(gpu).unwrap().settings().quantum;
    assert_eq!(of(&configuration, Some(GPU)), Quantum::Fixed(2 * SECOND));
    assert_eq!(of(&configuration, None), Quantum::Fixed(SECOND));
    configuration.request(None, &set(&[("anti-thrash", "off"), ("kill-unresponsive", "on")]), 7).unwrap();
    assert_eq!(of(&configuration, Some(GPU)), Quantum::Fixed(ENDLESS));
    assert!(configuration.options(None).unwrap().kill_unresponsive);
    configuration.request(None, &SettingsChange::Reset(vec!["anti-thrash".into()]), 7).unwrap();
    assert_eq!(of(&configuration, Some(GPU)), Quantum::Fixed(2 * SECOND));
    configuration.request(None, &set(&[("quantum", "3s")]), 7).unwrap();
    assert_eq!(of(&configuration, Some(GPU)), Quantum::Fixed(3 * SECOND), "all is all");
    configuration.request(None, &SettingsChange::Reset(Vec::new()), 7).unwrap();
    assert_eq!(of(&configuration, Some(GPU)), Quantum::Fixed(SECOND));
    assert!(!configuration.options(None).unwrap().kill_unresponsive);
}

#[test]
fn a_request_with_a_mistake_changes_nothing() {
    let mut configuration = configuration(&[], &[], "").unwrap();
    for (gpu, name, value, words) in [
        (None, "quantum", "soon", "'soon'"),
        (None, "quantun", "1s", "is 'quantum' meant?"),
        (None, "nvml-library", "/x", "systemctl restart"),
        (Some(GPU), "slots-per-user", "3", "whole node"),
        (None, "kill-unresponsive", "perhaps", "neither true nor false"),
    ] {
        let said = configuration.request(gpu, &set(&[("deadline", "5s"), (name, value)]), 0).unwrap_err();
        assert!(said.contains(words), "{said}");
        assert_eq!(configuration.options(gpu).unwrap().deadline, 60 * SECOND);
    }
}

#[test]
fn a_reload_reads_the_file_again_and_drops_what_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("nvshare.toml");
    std::fs::write(&file, "quantum = \"3s\"\nheadroom = \"1GiB\"").unwrap();
    let matches = parse(["nvshare-arbiter"]).unwrap();
    let mut configuration = Configuration::new(&matches, |_| None, &file).unwrap();
    configuration.request(None, &set(&[("deadline", "5s")]), 0).unwrap();
    std::fs::write(&file, "quantum = \"soon\"").unwrap();
    assert!(configuration.reload().unwrap_err().contains("'soon'"));
    assert_eq!(configuration.options(None).unwrap().deadline, 5 * SECOND, "a wrong file changes nothing");
    std::fs::write(&file, "quantum = \"4s\"\nlog-format = \"json\"").unwrap();
    let changed = configuration.reload().unwrap();
    let named: Vec<_> = changed.iter().map(|changed| (changed.name.as_str(), changed.change)).collect();
    let wanted = [
        ("headroom", Change::OfAGpu),
        ("quantum", Change::OfAGpu),
        ("deadline", Change::OfAGpu),
        ("log-format", Change::AtStart),
    ];
    assert_eq!(named, wanted);
    assert_eq!(changed[1].before, "3s");
    let settings = configuration.options(None).unwrap().settings();
    assert_eq!((settings.quantum, settings.deadline), (Quantum::Fixed(4 * SECOND), 60 * SECOND));
}

/// The file that is installed has examples in comments: as they stand they change nothing, without the comment signs they say
/// what is the default.
#[test]
fn the_installed_file_shows_the_defaults() {
    let text = include_str!("../../../packaging/nvshare.toml");
    let usual = format!("{:?}", configuration(&[], &[], "").unwrap().options(None).unwrap());
    let as_it_is = configuration(&[], &[], text).unwrap();
    assert_eq!(format!("{:?}", as_it_is.options(None).unwrap()), usual);
    let settings = text.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| {
        line.split_once(" = ")
            .is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
    });
    let settings: Vec<_> = settings.collect();
    assert!(settings.len() > 15, "{settings:?}");
    let uncommented = configuration(&[], &[], &settings.join("\n")).unwrap();
    let others = ["capacity", "gpu", "listen"];
    for name in uncommented.names.iter().filter(|name| !others.contains(&name.name.as_str())) {
        let default = name.default.clone().unwrap_or_default();
        assert_eq!(uncommented.shown(name, None), default, "{}", name.name);
    }
    for name in uncommented.names.iter().filter(|name| name.change != Change::AtStart) {
        assert!(settings.iter().any(|line| line.starts_with(&format!("{} = ", name.name))), "{}", name.name);
    }
}

proptest! {
    /// Whatever is asked for, the options are some options, and what is refused has changed nothing.
    #[test]
    fn any_request_is_done_or_refused(
        requests in prop::collection::vec((prop::bool::ANY, "[a-z-]{3,12}|quantum|capacity|deadline|idle-grace", "[0-9a-zA-Z.%]{0,8}"), 0..6),
    ) {
        let mut configuration = Configuration::of_arguments(&[]).unwrap();
        for (one, name, value) in requests {
            let gpu = one.then_some(GPU);
            let before = format!("{configuration:?}");
            let change = SettingsChange::Set(vec![(name, value)]);
            if configuration.request(gpu, &change, 0).is_err() {
                prop_assert_eq!(format!("{:?}", configuration), before);
            }
            prop_assert!(configuration.options(Some(GPU)).is_ok() && configuration.options(None).is_ok());
        }
    }
}
