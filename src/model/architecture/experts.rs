//! Where the experts of a mixture lie in a checkpoint, and what `config.json` calls their settings.

use super::Flag;
use super::weights::{Build, LinearWeights, Piece, TensorSource};
use crate::model::config::ExpertsConfig;
use crate::model::elements::Mxfp4;
use crate::model::ops::{GroupScore, Scoring};

/// An architecture's mixture of experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts {
    /// How many there are: the names of the setting, in the order in which they are tried, and the default, if there is one.
    pub(crate) count: (&'static [&'static str], Option<u32>),
    /// To how many a token goes: the setting and its default.
    pub(crate) selected: (&'static str, Option<u32>),
    /// Width of an expert between its two projections. `None`: what the model calls its intermediate size.
    pub(crate) intermediate_size: Option<(&'static str, u32)>,
    /// The settings of the activation, alpha and limit, and their defaults, if it is that of gpt-oss.
    pub(crate) clamped_swiglu: Option<[(&'static str, f64); 2]>,
    pub(crate) scoring: Scoring,
    /// Whether the scores of the selected experts are divided by their sum.
    pub(crate) renormalise: Flag,
    /// What the weights are multiplied by.
    pub(crate) scale: Option<(&'static str, f64)>,
    pub(crate) groups: Option<GroupKeys>,
    /// Experts that every token goes to, together one of so many times the width: the setting and its default.
    pub(crate) shared: Option<(&'static str, u32)>,
    /// Which layers have experts: those from the one with this number on, by default all; every n-th; and none that is in a list. The settings, those of
    /// numbers with their defaults.
    pub(crate) first: Option<(&'static str, u32)>,
    pub(crate) every: Option<(&'static str, u32)>,
    pub(crate) dense: Option<&'static str>,
    /// How the tensors are stored, in the order in which the forms are tried.
    pub(crate) forms: &'static [ExpertNames],
}

/// Groups of experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupKeys {
    /// The setting that says whether there are some: its default, with which there are none, and what it has to be. `None`: there are always some.
    pub(crate) method: Option<[&'static str; 3]>,
    /// How many there are, and how many are selected from: the settings and their defaults.
    pub(crate) count: (&'static str, u32),
    pub(crate) selected: (&'static str, u32),
    /// What they are selected by.
    pub(crate) score: GroupScore,
}

/// Names of tensors of a mixture. `{i}` stands for the layer, `{e}` for the expert.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertNames {
    /// The router, a linear layer.
    pub(crate) router: &'static str,
    pub(crate) router_bias: bool,
    /// What is added to scores where experts are selected, a vector.
    pub(crate) correction: Option<&'static str>,
    /// Linear layers of the expert that every token goes to: gate, up and down.
    pub(crate) shared: [&'static str; 3],
    pub(crate) tensors: ExpertTensors,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum ExpertTensors {
    /// Linear layers of each expert: gate, up and down.
    Each([&'static str; 3]),
    /// Tensors of all experts: `[experts, 2 * intermediate_size, hidden_size]`, all rows of the gate and then all of up, and
    /// `[experts, hidden_size, intermediate_size]`. Nothing is appended to the names.
    Packed([&'static str; 2]),
    /// Tensors of all experts: gate and up, each `[experts, intermediate_size, hidden_size]`, and down, `[experts, hidden_size, intermediate_size]`.
    /// `.weight` and, if there are biases, `.bias` is appended.
    Stacked { names: [&'static str; 3], bias: bool },
    /// Tensors of all experts, of transposed matrices: `[experts, hidden_size, 2 * intermediate_size]` with gate and up in alternation, and
    /// `[experts, intermediate_size, hidden_size]`, and with `_bias` appended their biases.
    Interleaved([&'static str; 2]),
    /// The same in the format of [`Mxfp4`], not transposed, with `_blocks` and `_scales` appended.
    Mxfp4([&'static str; 2]),
}

impl ExpertNames {
    /// A tensor that a checkpoint of this form has for a layer with experts.
    fn first(&self, build: &Build<'_>, layer: u32) -> String {
        match self.tensors {
            ExpertTensors::Each([gate, ..]) => format!("{}.weight", build.name(&of_expert(gate, 0), layer)),
            ExpertTensors::Stacked { names: [gate, ..], .. } => format!("{}.weight", build.name(gate, layer)),
            ExpertTensors::Packed([gate_up, _]) | ExpertTensors::Interleaved([gate_up, _]) => {
                build.name(gate_up, layer)
            }
            ExpertTensors::Mxfp4([gate_up, _]) => format!("{}_blocks", build.name(gate_up, layer)),
        }
    }
}

impl Experts {
    /// Whether checkpoints may have them in MXFP4.
    pub(crate) fn has_mxfp4(&self) -> bool {
        self.forms.iter().any(|form| matches!(form.tensors, ExpertTensors::Mxfp4(_)))
    }

    /// The form of a checkpoint: that of its first layer with experts.
    pub(super) fn form(
        &self,
        build: &Build<'_>,
        config: &ExpertsConfig,
        has: impl Fn(&str) -> bool,
    ) -> Option<&'static ExpertNames> {
        // A model without experts in so many layers may have any form.
        let mut layers = 0..build.config.num_layers.min(1 << 16);
        let layer = layers.find(|&layer| config.layers.contains(layer)).unwrap_or(0);
        let sizes = [build.config.hidden_size, config.intermediate_size];
        let in_groups = sizes.iter().all(|size| size.is_multiple_of(Mxfp4::GROUP as u32));
        let mut forms = self.forms.iter().filter(|form| in_groups || !matches!(form.tensors, ExpertTensors::Mxfp4(_)));
        forms.clone().find(|form| has(&form.first(build, layer))).or_else(|| forms.next())
    }
}

fn of_expert(template: &str, expert: u32) -> String {
    template.replace("{e}", &expert.to_string())
}

/// The rows of one of `parts` matrices that alternate in a tensor, `out` of each.
fn interleaved(tensor: String, shape: Vec<usize>, part: usize, parts: usize, out: usize) -> Piece {
    let (run, stride) = if parts == 1 { (out, out) } else { (1, parts) };
    Piece { rows: out, first: part, run, stride, ..Piece::row(tensor, shape) }
}

/// The parameters of a layer's experts.
pub(super) struct ExpertWeights {
    pub(super) router: LinearWeights,
    pub(super) gate_up: LinearWeights,
    pub(super) down: LinearWeights,
    pub(super) correction: Option<TensorSource>,
    pub(super) shared: Option<[LinearWeights; 2]>,
}

impl Build<'_> {
    pub(super) fn experts(&self, names: &ExpertNames, config: &ExpertsConfig, layer: u32) -> ExpertWeights {
        let (hidden, inner) = (self.config.hidden_size as usize, config.intermediate_size as usize);
        let count = config.router.experts.count;
        let router = self.linear(names.router, count as usize, hidden, names.router_bias, layer);
        let [gate_up, down] = match names.tensors {
            ExpertTensors::Each([gate, up, down]) => {
                let each = |templates: &[&str], out, columns| {
                    let names = (0..count).flat_map(|e| templates.iter().map(move |template| of_expert(template, e)));
                    let pieces = names.flat_map(|name| self.linear(&name, out, columns, false, layer).weight.pieces);
                    LinearWeights { weight: TensorSource { pieces: pieces.collect(), columns }, bias: None }
                };
                [each(&[gate, up], inner, hidden), each(&[down], hidden, inner)]
            }
            ExpertTensors::Packed([gate_up, down]) => {
                let all = |name, out: usize, columns: usize| {
                    let rows = count as usize * out;
                    let tensor = self.name(name, layer);
                    let shape = vec![count as usize, out, columns];
                    let piece = Piece { rows, run: rows, stride: rows, ..Piece::row(tensor, shape) };
                    LinearWeights { weight: TensorSource { pieces: vec![piece], columns }, bias: None }
                };
                [all(gate_up, 2 * inner, hidden), all(down, hidden, inner)]
            }
            ExpertTensors::Stacked { names: [gate, up, down], bias } => {
                let all = |names: &[&str], end: &str, out: usize, columns: usize| {
                    let shape =
                        if columns == 1 { vec![count as usize, out] } else { vec![count as usize, out, columns] };
                    let names: Vec<_> = names.iter().map(|name| format!("{}.{end}", self.name(name, layer))).collect();
                    let rows = |e: usize, name: &String| {
                        let piece = Piece::row(name.clone(), shape.clone());
                        Piece { rows: out, first: e * out, run: out, stride: out, ..piece }
                    };
                    let pieces = (0..count as usize).flat_map(|e| names.iter().map(move |name| rows(e, name)));
                    TensorSource { pieces: pieces.collect(), columns }
                };
                let of = |names: &[&str], out, columns| LinearWeights {
                    weight: all(names, "weight", out, columns),
                    bias: bias.then(|| all(names, "bias", out, 1)),
                };
                [of(&[gate, up], inner, hidden), of(&[down], hidden, inner)]
            }
            ExpertTensors::Interleaved([gate_up, down]) => {
                let of = |name: &str, parts: usize, out: usize, columns: usize| {
                    let name = self.name(name, layer);
                    let all = |e, part, tensor| Piece {
                        transposed: true,
                        matrix: e,
                        ..interleaved(tensor, vec![count as usize, columns, parts * out], part, parts, out)
                    };
                    self.of_experts(count, parts, out, columns, &name, |e, part| all(e, part, name.clone()))
                };
                [of(gate_up, 2, inner, hidden), of(down, 1, hidden, inner)]
            }
            ExpertTensors::Mxfp4([gate_up, down]) => {
                let of = |name: &str, parts: usize, out: usize, columns: usize| {
                    let name = self.name(name, layer);
                    let shape = vec![count as usize, parts * out, columns / Mxfp4::GROUP, Mxfp4::GROUP / 2];
                    let rows = |e: usize, part| {
                        let tensor = format!("{name}_blocks");
                        let first = e * parts * out + part;
                        let scales = Some(format!("{name}_scales"));
                        Piece { first, scales, ..interleaved(tensor, shape.clone(), part, parts, out) }
                    };
                    self.of_experts(count, parts, out, columns, &name, rows)
                };
                [of(gate_up, 2, inner, hidden), of(down, 1, hidden, inner)]
            }
        };
        let correction = names.correction.map(|name| self.vector(name, count as usize, layer));
        let shared = config.shared_size.map(|size| {
            let [gate, up, down] = names.shared;
            let size = size as usize;
            let [mut gate_up, up] = [gate, up].map(|name| self.linear(name, size, hidden, false, layer));
            gate_up.weight.pieces.extend(up.weight.pieces);
            [gate_up, self.linear(down, hidden, size, false, layer)]
        });
        ExpertWeights { router, gate_up, down, correction, shared }
    }

    /// The matrices of all experts, `parts` of each, whose biases alternate in a tensor.
    fn of_experts(
        &self,
        count: u32,
        parts: usize,
        out: usize,
        columns: usize,
        name: &str,
        weights: impl Fn(usize, usize) -> Piece,
    ) -> LinearWeights {
        let count = count as usize;
        let bias = |e: usize, part: usize| {
            let piece = interleaved(format!("{name}_bias"), vec![count, parts * out], part, parts, out);
            Piece { first: e * parts * out + part, ..piece }
        };
        let all = |piece: &dyn Fn(usize, usize) -> Piece, columns| {
            let pieces = (0..count).flat_map(|e| (0..parts).map(move |part| piece(e, part)));
            TensorSource { pieces: pieces.collect(), columns }
        };
        LinearWeights { weight: all(&weights, columns), bias: Some(all(&bias, 1)) }
    }
}
