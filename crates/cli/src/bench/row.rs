//! A result: a line for people, an object for machines, a line in the record.

use crate::BUILD;
use crate::output::Output;
use anyhow::Context;
use hadal_kernels::{Device, Spent};
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// One result. A rate, of which more is better; or, of an op of a step, its milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Kind of bench.
    pub bench: &'static str,
    /// Which case of it.
    pub case: String,
    /// Of `ours`, `rival` and `spread`.
    pub unit: &'static str,
    /// Median.
    pub ours: f64,
    /// What it ran beside.
    pub rival_name: Option<String>,
    /// Median.
    pub rival: Option<f64>,
    /// ours / rival.
    pub ratio: Option<f64>,
    /// ours over what the machine can do at most.
    pub share_of_peak: Option<f64>,
    /// The commit this was built from.
    pub commit: &'static str,
    /// See [`machine`].
    pub machine: String,
    /// The slowest and the fastest of ours.
    pub spread: [f64; 2],
    /// What only training tells.
    #[serde(flatten)]
    pub training: Option<Training>,
    /// Of an op of a step: how often it is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<usize>,
}

/// What training tells beside its speed.
#[derive(Clone, Debug, Serialize)]
pub struct Training {
    /// Cross-entropy of the first step, before any update.
    pub first_loss: f64,
    /// Mean over all steps.
    pub mean_loss: f64,
    /// Resident bytes at most during the steps, less `state_bytes` and what the process held before there was a model;
    /// null where the system does not tell.
    pub peak_bytes: Option<u64>,
    /// Parameters, gradients and state of the optimiser.
    pub state_bytes: u64,
    /// How far the host was ahead of a GPU.
    #[serde(flatten)]
    pub ahead: Option<Ahead>,
    /// Seconds of a step by op, if asked for.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "seconds")]
    pub by_op: Option<BTreeMap<String, Spent>>,
}

fn seconds<S: Serializer>(by_op: &Option<BTreeMap<String, Spent>>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(by_op.iter().flatten().map(|(op, spent)| (op, spent.seconds)))
}

/// Steps that were given to a GPU without waiting for it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ahead {
    /// Times a step that the host waited for the device, blocking copies included.
    pub host_waits: f64,
    /// Every timed step was a recording replayed.
    pub graph_replayed: bool,
}

impl Training {
    /// Of these losses.
    pub fn new(
        losses: &[f64],
        peak_bytes: Option<u64>,
        state_bytes: u64,
        by_op: Option<BTreeMap<String, Spent>>,
    ) -> Self {
        let mean_loss = losses.iter().sum::<f64>() / losses.len() as f64;
        Self { first_loss: losses[0], mean_loss, peak_bytes, state_bytes, ahead: None, by_op }
    }

    fn text(&self) -> String {
        let peak = self.peak_bytes.map_or("unknown".into(), |n| crate::inspect::scaled(n as f64, "B"));
        let state = crate::inspect::scaled(self.state_bytes as f64, "B");
        let mut s = format!("\n  loss {:.4} at first, {:.4} on average", self.first_loss, self.mean_loss);
        s += &format!("; peak memory {peak} beside {state} of state");
        let mut ops: Vec<_> = self.by_op.iter().flatten().collect();
        ops.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        let all: f64 = ops.iter().map(|(_, spent)| spent.seconds).sum();
        for (op, Spent { seconds, calls }) in ops {
            let share = 100.0 * seconds / all;
            s += &format!("\n  {op:<30} {:>9.3} ms {share:>5.1} % {calls:>5} calls", 1e3 * seconds);
        }
        s
    }
}

impl Row {
    /// A result without a rival.
    pub fn new(device: &Device, bench: &'static str, case: String, unit: &'static str, ours: f64) -> Self {
        Self {
            bench,
            case,
            unit,
            ours,
            rival_name: None,
            rival: None,
            ratio: None,
            share_of_peak: None,
            commit: BUILD.commit,
            machine: machine(device),
            spread: [ours; 2],
            training: None,
            calls: None,
        }
    }

    /// The ops of a measured step as results of their own.
    pub fn ops(&self) -> Vec<Self> {
        let row = |(op, spent): (&String, &Spent)| {
            let (case, ms) = (format!("{}/{op}", self.case), 1e3 * spent.seconds);
            let empty = Self { rival_name: None, rival: None, ratio: None, share_of_peak: None, ..self.clone() };
            let calls = Some(spent.calls);
            Self { bench: "train_by_op", case, unit: "ms", ours: ms, spread: [ms; 2], training: None, calls, ..empty }
        };
        self.training.iter().flat_map(|t| t.by_op.iter().flatten()).map(row).collect()
    }

    fn text(&self) -> String {
        let [least, most] = self.spread;
        let mut s = format!("{:<66} {:>9.1} {:<8} {least:>9.1} ..{most:>9.1}", self.case, self.ours, self.unit);
        if let (Some(name), Some(rival), Some(ratio)) = (&self.rival_name, self.rival, self.ratio) {
            s += &format!("  {ratio:>5.2} x {rival:.1} of {name}");
        }
        if let Some(share) = self.share_of_peak.filter(|s| Some(*s) != self.ratio) {
            s += &format!("  {:>5.1} % of peak", 100.0 * share);
        }
        if let Some(t) = &self.training {
            s += &t.text();
        }
        s + "\n"
    }
}

/// Where results go.
pub struct Sink<'a> {
    out: &'a Output,
    record: bool,
}

impl<'a> Sink<'a> {
    /// To stdout, and into the record if asked for: that it takes results is found out before there are any.
    pub fn new(out: &'a Output, record: bool, device: &Device) -> anyhow::Result<Self> {
        if record {
            appendable(&record_of(&machine(device)))?;
        }
        Ok(Self { out, record })
    }

    /// Prints and records a result; before it its ops, which for people are lines of the result itself.
    pub fn put(&mut self, row: Row) -> anyhow::Result<()> {
        self.out.text(&row.text());
        for row in row.ops().iter().chain([&row]) {
            self.out.object(row);
            if self.record {
                append(row)?;
            }
        }
        Ok(())
    }
}

/// The record of a machine and this day.
fn record_of(machine: &str) -> PathBuf {
    Path::new("bench/record").join(machine).join(format!("{}.jsonl", today()))
}

fn open(path: &Path) -> std::io::Result<File> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    File::options().create(true).append(true).open(path)
}

/// An error if nothing can be appended to `path`. Makes its folder, but leaves no empty file in it: where there is none yet,
/// one of another name is made and removed, lest somebody else's results go with it.
fn appendable(path: &Path) -> anyhow::Result<()> {
    let other = (!path.exists()).then(|| path.with_extension(format!("{}.tmp", std::process::id())));
    let opened = open(other.as_deref().unwrap_or(path)).map(drop);
    opened.and_then(|()| other.map_or(Ok(()), std::fs::remove_file)).with_context(|| cannot_append(path))
}

fn cannot_append(path: &Path) -> String {
    format!("{}: cannot append a result", path.display())
}

/// Appends to the record of this machine and day.
fn append(row: &Row) -> anyhow::Result<()> {
    let path = record_of(&row.machine);
    let line = format!("{}\n", serde_json::to_string(row)?);
    open(&path).and_then(|mut file| file.write_all(line.as_bytes())).with_context(|| cannot_append(&path))
}

/// The GPU's name, or the CPU's as the system spells it and the number of cores; in small letters, digits and dashes.
pub fn machine(device: &Device) -> String {
    if let Some(cuda) = device.as_cuda() {
        return slug(cuda.name());
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{}-{cores}", slug(&cpu_name(&text)))
}

/// The CPU's name in /proc/cpuinfo. Virtual machines leave out which one of a maker's line it is: where the name has no
/// digit, family and model tell generations apart.
fn cpu_name(info: &str) -> String {
    let of = |key: &str| {
        let mut found = info.lines().filter_map(|l| l.split_once(':')).filter(|(k, _)| k.trim() == key);
        found.next().map(|(_, value)| value.trim())
    };
    let name = of("model name").unwrap_or(std::env::consts::ARCH);
    match (of("cpu family"), of("model")) {
        (Some(family), Some(model)) if !name.contains(|c: char| c.is_ascii_digit()) => {
            format!("{name} family {family} model {model}")
        }
        _ => name.into(),
    }
}

fn slug(name: &str) -> String {
    let kept = name.to_ascii_lowercase().replace("(r)", " ").replace("(tm)", " ");
    let words: Vec<&str> = kept.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
    words.join("-")
}

/// The date in UTC.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds / 86400)
}

/// The date so many days after 1970-01-01, by counting years of 365.2425 days from a 1 March.
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + u64::from(month <= 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_plain_names() {
        assert_eq!(slug("Intel(R) Xeon(R) Platinum 8488C"), "intel-xeon-platinum-8488c");
        assert_eq!(slug(" AMD EPYC 9R14 96-Core Processor"), "amd-epyc-9r14-96-core-processor");
        let info = |name: &str| format!("processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\n");
        assert_eq!(slug(&cpu_name(&info("AMD EPYC"))), "amd-epyc-family-26-model-2");
        assert_eq!(cpu_name(&info("AMD EPYC 9R14")), "AMD EPYC 9R14");
        assert_eq!(cpu_name("CPU implementer\t: 0x41\n"), std::env::consts::ARCH);
        let device = Device::cpu(Some(1)).unwrap();
        assert!(machine(&device).chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
    }

    /// Keys that only training on a GPU has, only training, or only an op of a step.
    #[test]
    fn a_result_has_the_keys_of_its_kind() {
        let row = Row::new(&Device::cpu(Some(1)).unwrap(), "train", "nano 1x8 bf16 cuda".into(), "tokens/s", 1.0);
        let object = |row: &Row| serde_json::to_value(row).unwrap().as_object().unwrap().clone();
        let plain: Vec<String> = object(&row).keys().cloned().collect();
        let added = |row: &Row| -> serde_json::Map<String, serde_json::Value> {
            object(row).into_iter().filter(|(key, _)| !plain.contains(key)).collect()
        };
        let keys = |row: &Row| added(row).keys().cloned().collect::<Vec<_>>();
        let of_training = ["first_loss", "mean_loss", "peak_bytes", "state_bytes"];
        let trained = |ahead| {
            let training = Training { ahead, ..Training::new(&[2.0, 1.0], Some(3), 4, None) };
            Row { training: Some(training), ..row.clone() }
        };
        assert_eq!(keys(&trained(None)), of_training);
        let on_gpu = trained(Some(Ahead { host_waits: 0.0, graph_replayed: true }));
        let mut all = of_training.to_vec();
        all.extend(["host_waits", "graph_replayed"]);
        assert_eq!(keys(&on_gpu), all);
        assert_eq!((&added(&on_gpu)["host_waits"], &added(&on_gpu)["graph_replayed"]), (&0.0.into(), &true.into()));
        let by_op = BTreeMap::from([("adamw".to_string(), Spent { seconds: 0.5, calls: 2 })]);
        let timed = Row { training: Some(Training::new(&[1.0], None, 4, Some(by_op))), ..row.clone() };
        assert_eq!(keys(&timed), [&of_training[..], &["by_op"]].concat());
        assert!(added(&timed)["peak_bytes"].is_null() && added(&timed)["by_op"]["adamw"] == 0.5);
        assert_eq!(timed.ops().iter().map(keys).collect::<Vec<_>>(), [["calls"]]);
    }

    #[test]
    fn days_have_dates() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (19_723, "2024-01-01"),
            (20_088, "2024-12-31"),
        ] {
            assert_eq!(date(days), expected);
        }
    }
}
