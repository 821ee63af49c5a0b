//! Reports, read and shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use folio::verify::{Accuracy, CaseResult, Outcome, Report};

use crate::files::read_text;

/// Reads reports. They come in the order of their adapters.
pub(super) fn read(files: &[PathBuf]) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for file in files {
        let of = || file.display().to_string();
        let report: Report = serde_json::from_str(&read_text(file)?).with_context(of)?;
        let (have, need) = (report.schema, Report::SCHEMA);
        ensure!(have == need, "{}: schema: got version {have}, need {need}", of());
        reports.push(report);
    }
    reports.sort_by_key(|report| (name(report), report.kernels.clone(), ways(report), report.max_workgroup_bytes));
    Ok(reports)
}

/// Adapter, API and driver.
pub(super) fn name(report: &Report) -> String {
    let on = &report.adapter;
    format!("{}, {}, {}", on.adapter, on.backend, on.driver)
}

/// What beside the family decides which kernels run.
fn ways(report: &Report) -> String {
    let subgroups = report.subgroup_size.map(|size| format!("subgroups of {size}"));
    let matrix =
        (report.adapter.matrix_rows > 0).then(|| format!("matrix units of {} rows", report.adapter.matrix_rows));
    let packed = report.adapter.packed_dots.then(|| "packed dot products".to_owned());
    let checks = (report.checks == "full").then(|| "full checks".to_owned());
    let all: Vec<_> = [subgroups, matrix, packed, checks].into_iter().flatten().collect();
    if all.is_empty() { "no subgroups".to_owned() } else { all.join(", ") }
}

fn computed(report: &Report) -> impl Iterator<Item = (&CaseResult, &Accuracy)> {
    report.cases.iter().filter_map(|case| match &case.outcome {
        Outcome::Computed(accuracy) => Some((case, accuracy)),
        _ => None,
    })
}

/// The larger of two errors; none is larger than all.
fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a?.max(b?))
}

fn shown(error: Option<f64>) -> String {
    error.map_or_else(
        || "**not finite**".to_owned(),
        |error| if error > 1.0 { format!("**{error:.3}**") } else { format!("{error:.3}") },
    )
}

struct Sum {
    worst: Option<f64>,
    worst_lse: Option<f64>,
    mean: f64,
    computed: usize,
    beyond: usize,
}

fn sum(report: &Report) -> Sum {
    let zero = Sum { worst: Some(0.0), worst_lse: Some(0.0), mean: 0.0, computed: 0, beyond: 0 };
    let mut sum = computed(report).fold(zero, |sum, (case, of)| Sum {
        worst: larger(sum.worst, of.worst),
        worst_lse: larger(sum.worst_lse, of.worst_lse),
        mean: sum.mean + of.mean.unwrap_or(f64::INFINITY),
        computed: sum.computed + 1,
        beyond: sum.beyond + usize::from(!case.is_within()),
    });
    sum.mean /= sum.computed.max(1) as f64;
    sum
}

/// One line about a report.
pub(super) fn summary(report: &Report) -> String {
    let sum = sum(report);
    let failed = report.cases.len() - sum.computed;
    let plain = |error: Option<f64>| error.map_or_else(|| "not finite".to_owned(), |error| format!("{error:.3}"));
    let verdict = match (sum.beyond, failed) {
        (0, 0) => "all within their bounds".to_owned(),
        (0, failed) => format!("{failed} could not be computed"),
        (beyond, failed) => format!("{beyond} beyond their bounds, {failed} could not be computed"),
    };
    format!(
        "{} cases, {verdict}; worst {} of its bound, lse {}",
        report.cases.len(),
        plain(sum.worst),
        plain(sum.worst_lse)
    )
}

/// A page about reports, in Markdown.
pub(super) fn page(reports: &[Report]) -> String {
    let mut page = String::from(INTRODUCTION);
    page += "\n| Adapter, API, driver | kernels | with | binding MiB | cases | beyond | not computed | worst | mean | worst lse |\n";
    page += "|---|---|---|---|---|---|---|---|---|---|\n";
    for report in reports {
        let sum = sum(report);
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {:.4} | {} |",
            name(report).replace('|', "/"),
            report.kernels,
            ways(report),
            report.max_binding_bytes >> 20,
            report.cases.len(),
            sum.beyond,
            report.cases.len() - sum.computed,
            shown(sum.worst),
            sum.mean,
            shown(sum.worst_lse)
        );
    }
    page += BY_CASE;
    page += "\n| Case | adapters | worst | mean | different bits, gpu | cpu |\n|---|---|---|---|---|---|\n";
    let mut ids: Vec<&str> = Vec::new();
    let mut by_id: BTreeMap<&str, Vec<(&Report, &Accuracy)>> = BTreeMap::new();
    for report in reports {
        for (case, accuracy) in computed(report) {
            let of_case = by_id.entry(&case.id).or_default();
            if of_case.is_empty() {
                ids.push(&case.id);
            }
            of_case.push((report, accuracy));
        }
    }
    for id in ids {
        let of_case = &by_id[id];
        let worst = of_case.iter().try_fold(0.0_f64, |worst, (_, of)| Some(worst.max(of.worst?)));
        let mean = of_case.iter().map(|(_, of)| of.mean.unwrap_or(f64::INFINITY)).sum::<f64>() / of_case.len() as f64;
        let bits = |family: &str| -> usize {
            let of_family = of_case.iter().filter(|(report, _)| report.kernels == family);
            of_family.map(|(_, of)| of.hash).collect::<BTreeSet<_>>().len()
        };
        let _ = writeln!(
            page,
            "| {id} | {} | {} | {mean:.4} | {} | {} |",
            of_case.len(),
            shown(worst),
            bits("gpu"),
            bits("cpu")
        );
    }
    let failed = reports.iter().flat_map(|report| report.cases.iter().map(move |case| (report, case)));
    let failed: Vec<_> = failed.filter(|(_, case)| matches!(case.outcome, Outcome::Failed(_))).collect();
    if !failed.is_empty() {
        page += "\n## Not computed\n\n";
        for (report, case) in failed {
            let _ = writeln!(page, "* {}, {} kernels: {case}", name(report), report.kernels);
        }
    }
    page
}

const INTRODUCTION: &str = "\
# How accurate folio is, per adapter

Written by `folio verify --page docs/adapters/verify/*.json`; a test compares. Each row is a report of `folio verify`: a fixed grid of small steps of
attention, computed by the kernels on that adapter over a cache whose blocks lie in a random order and whose unused bytes are NaN. Errors are
distances from an f64 oracle over the rows as the cache keeps them, **in units of the bound** that f32 arithmetic can account for, derived for
each element (`folio::reference::ErrorModel`): up to 1 is right, and what is above 1 is a bug, of folio or of the driver.

**Yours is missing?** `folio verify --json report.json`, once as it is and once with `--webgpu`, and a pull request that adds the file to `docs/adapters/verify/` under the
name of the adapter and of the driver, in lower case (`nvidia-h200-vulkan-570.json`). `scripts/portability.sh` makes all that one machine can.
";

const BY_CASE: &str = "
## By case

The worst error on any adapter, the mean over adapters, and how many different results there are to the bit, for each family of kernels: 1 where all adapters
agree. Their arithmetic differs in `exp2`, in fused multiply-adds, and in the order of sums over lanes.
";
