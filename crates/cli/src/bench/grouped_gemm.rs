//! `bench grouped_gemm`: the routed experts' products beside one dense product of the same operations in the same
//! process: what cutting the rows by expert costs.

use super::case::{Against, Case, Ready, Unit};
use super::gemm::{Form, Product};
use super::inputs;
use super::measure::Work;
use hadal_kernels::ops::gemm_grouped;
use hadal_kernels::{Ctx, DType, Weight};
use hadal_model::FeedForwardIds;
use serde_json::json;

const RIVAL: &str = "hadal gemm";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    InputGradient,
    WeightGradient,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::InputGradient => "input gradient",
            Self::WeightGradient => "weight gradient",
        }
    }
}

/// One stack of experts' matrices `[out, width]`.
#[derive(Clone)]
struct Group {
    counts: Vec<usize>,
    out: usize,
    width: usize,
    direction: Direction,
    /// On a GPU: against the dense product or the bytes, whichever is slower; a weight's gradient overwrites, as in the
    /// only or first micro-batch of a step.
    gpu: bool,
}

impl Group {
    /// What must be read and written at least: of experts that have rows.
    fn bytes(&self) -> usize {
        let (experts, rows) = (self.counts.iter().filter(|c| **c > 0).count(), self.counts.iter().sum::<usize>());
        let activations = rows * (self.out + self.width) * DType::Bf16.size();
        let weights = experts * self.out * self.width;
        activations
            + match self.direction {
                Direction::WeightGradient => weights * DType::F32.size() * if self.gpu { 1 } else { 2 },
                _ => weights * DType::Bf16.size(),
            }
    }
}

/// All cases. Of a GPU not `mini`'s, but sizes from 1024 x 1024 to DeepSeek-V3's with few and many rows.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    let gpu = ctx.device.as_cuda().is_some();
    let mut all = if gpu { grid() } else { Vec::new() };
    let presets: &[_] =
        if gpu { &[("1b", 16384), ("nano", 16)] } else { &[("mini", 4096), ("v2-lite", 4096), ("nano", 16)] };
    for &(preset, tokens) in presets {
        let (config, layout) = super::preset(preset);
        let (experts, top_k) = (config.n_routed_experts, config.num_experts_per_tok);
        let moe = layout.blocks.iter().find_map(|b| match b.feed_forward {
            FeedForwardIds::Moe(ids) => Some(ids.experts),
            FeedForwardIds::Dense(_) => None,
        });
        let ids = moe.expect("the presets have experts");
        for (name, id) in [("gate_up_proj", ids.gate_up), ("down_proj", ids.down)] {
            let t = layout.info(id);
            for (split, counts) in [
                ("even", split(&vec![1.0; experts], tokens, top_k)),
                ("zipf", split(&(1..=experts).map(|r| 1.0 / r as f64).collect::<Vec<_>>(), tokens, top_k)),
            ] {
                all.extend(directions(&format!("{preset}/{name}"), split, [t.rows, t.cols], &counts, gpu));
            }
        }
    }
    all
}

/// Matrices `[out, in]`, experts and rows of each on average.
fn grid() -> Vec<Case> {
    let mut all = Vec::new();
    for size in [[4096, 7168], [7168, 2048], [2816, 2048], [1024, 1024]] {
        for (experts, each) in [(8, 1024), (64, 1024), (8, 128), (64, 128)] {
            // A token goes to an eighth of the experts.
            let (tokens, top_k) = (8 * each, experts / 8);
            let zipf: Vec<f64> = (1..=experts).map(|r| 1.0 / r as f64).collect();
            for (name, weights) in [("even", vec![1.0; experts]), ("zipf", zipf)] {
                let counts = split(&weights, tokens, top_k);
                all.extend(directions(&format!("rows {each}"), name, size, &counts, true));
            }
        }
    }
    all
}

fn directions(of: &str, split: &str, [out, width]: [usize; 2], counts: &[usize], gpu: bool) -> Vec<Case> {
    [Direction::Forward, Direction::InputGradient, Direction::WeightGradient]
        .map(|direction| {
            let name = direction.name();
            let rows: usize = counts.iter().sum();
            let name = format!("{of}/{split}/{name} {}x[{out}, {width}], {rows} rows", counts.len());
            case(name, Group { counts: counts.to_vec(), out, width, direction, gpu })
        })
        .into()
}

/// Rows of each expert in proportion to `weights`, `tokens * top_k` together: no expert gets a token twice, and what an
/// expert cannot take goes to the others.
fn split(weights: &[f64], tokens: usize, top_k: usize) -> Vec<usize> {
    let mut counts = vec![0; weights.len()];
    let mut left = tokens * top_k;
    while left > 0 {
        let open: f64 = (0..counts.len()).filter(|&e| counts[e] < tokens).map(|e| weights[e]).sum();
        let share = left as f64 / open;
        let mut given = 0;
        for (count, weight) in counts.iter_mut().zip(weights) {
            let more = ((weight * share) as usize).min(tokens - *count).min(left - given);
            *count += more;
            given += more;
        }
        // Less than one row each: one after the other, the likeliest first.
        if given == 0 {
            for count in counts.iter_mut().filter(|c| **c < tokens).take(left) {
                *count += 1;
                given += 1;
            }
        }
        left -= given;
    }
    counts
}

fn case(name: String, group: Group) -> Case {
    let rows: usize = group.counts.iter().sum();
    let (out, width) = (group.out, group.width);
    let act = DType::Bf16;
    let p = |[m, n, k]: [usize; 3], form, c, accumulate| Product { m, n, k, form, dtypes: [act, act, c], accumulate };
    let dense = match group.direction {
        Direction::Forward => p([rows, out, width], Form::Nt, act, false),
        Direction::InputGradient => p([rows, width, out], Form::Nn, act, false),
        Direction::WeightGradient => p([out, width, rows], Form::Tn, DType::F32, !group.gpu),
    };
    Case {
        name,
        sizes: json!({
            "experts": group.counts.len(), "rows": rows, "out": out, "in": width, "counts": group.counts,
            "direction": group.direction.name(),
        }),
        unit: Unit::Gflops,
        work: dense.flops(),
        against: if group.gpu { Against::RivalOrBytes(group.bytes() as f64) } else { Against::Bf16 },
        setup: Box::new(move |ctx| Ready { ours: work(&group, ctx), rival: Some((RIVAL, dense.work(ctx, 1))) }),
    }
}

fn work(group: &Group, ctx: &Ctx) -> Work {
    let Group { counts, out, width, direction, gpu } = group.clone();
    let (experts, rows) = (counts.len(), counts.iter().sum::<usize>());
    let offsets = inputs::offsets(ctx, &counts);
    let floats = |len, stream| inputs::floats(ctx, DType::Bf16, len, stream);
    let of_out = |stream| floats(rows * out, stream);
    let of_in = |stream| floats(rows * width, stream);
    let weight = || floats(experts * out * width, 2);
    let held = ctx.clone();
    match direction {
        Direction::Forward => {
            let (x, w, mut y) = (of_in(1), weight(), ctx.zeros(DType::Bf16, rows * out));
            Box::new(move || {
                let w = Weight::stacked(w.view(), experts, out, width);
                gemm_grouped::grouped(&held, x.view(), offsets.view(), &w, y.view_mut());
            })
        }
        Direction::InputGradient => {
            let (dy, w, mut dx) = (of_out(1), weight(), ctx.zeros(DType::Bf16, rows * width));
            Box::new(move || {
                let w = Weight::stacked(w.view(), experts, out, width);
                gemm_grouped::grouped_backward_input(&held, dy.view(), offsets.view(), &w, dx.view_mut());
            })
        }
        Direction::WeightGradient => {
            let (x, dy, mut dw) = (of_in(1), of_out(2), ctx.zeros(DType::F32, experts * out * width));
            Box::new(move || {
                let (x, dy, offsets) = (x.view(), dy.view(), offsets.view());
                gemm_grouped::grouped_backward_weight(&held, x, dy, offsets, out, width, dw.view_mut(), !gpu);
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_by_weight_and_no_expert_has_a_token_twice() {
        assert_eq!(split(&[1.0; 4], 6, 2), [3; 4]);
        assert_eq!(split(&[1.0; 3], 4, 1), [2, 1, 1]);
        for (experts, tokens, top_k) in [(32, 4096, 4), (64, 4096, 6), (16, 16, 4), (4, 5, 4)] {
            let zipf: Vec<f64> = (1..=experts).map(|r| 1.0 / r as f64).collect();
            let counts = split(&zipf, tokens, top_k);
            assert_eq!(counts.iter().sum::<usize>(), tokens * top_k);
            assert!(counts.iter().all(|&c| c <= tokens) && counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
        }
    }
}
