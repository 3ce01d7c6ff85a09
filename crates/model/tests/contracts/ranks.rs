//! Experts split over two ranks, each with its own part of the batch, are one rank with all of it. Dense gradients are
//! the ranks' to reduce: summed in the order of ranks they are those of one rank that takes the parts one after the
//! other.

use crate::setup::*;
use hadal_kernels::Ctx;
use hadal_model::heads::{self, Request};
use hadal_model::trunk::{self, Input, Options};
use hadal_model::{
    Batch, Grads, Kind, Model, ModelConfig, MtpHidden, Params, Precision, Recompute, Scope, Sequence, Shared, mtp, pass,
};

/// What one rank, or one process with everything, sees.
struct Seen {
    /// By name: hidden states and log-probabilities of every depth's tokens, balance losses of every sequence, gradient
    /// of the trunk's input. Each is in batch order, so that two ranks' joined are one rank's.
    rows: Vec<(String, Vec<u32>)>,
    gradients: Named,
    /// Before the further uses of embedding and head are folded onto the first: what ranks would reduce.
    unfolded: Named,
    /// By MoE layer in order, then expert; over all ranks.
    loads: Vec<i64>,
}

fn observe(ctx: &Ctx, model: &Model, params: &Params, batch: &Batch) -> Seen {
    let weights = loss_weights(&model.config);
    let mut rows = forward_rows(ctx, model, params, batch);
    let f = pass::forward(ctx, model, params, batch, &weights, None);
    let mut loads: Vec<i64> = f.traces.iter().flat_map(|t| t.load()).collect();
    model.exchange.sum_counts(&mut loads);
    for t in &f.traces {
        rows.push((format!("balance of layer {}", t.layer), bits(t.balance.as_ref().unwrap())));
    }
    let (dh, jobs) = pass::backward_input(ctx, model, params, f);
    rows.push(("input gradient".into(), bits(&dh)));
    let mut grads = Grads::zeros(ctx, model.layout.clone());
    jobs.run(ctx, params, &mut grads);
    let unfolded = each_use(&mut grads);
    grads.fold(ctx);
    Seen { rows, gradients: named(&grads), unfolded, loads }
}

/// Dense gradients before folding, every use of embedding and head by itself.
fn each_use(grads: &mut Grads) -> Named {
    let mut all: Named = named(grads).into_iter().filter(|(n, _)| !routed(n)).collect();
    let layout = grads.layout.clone();
    for id in [layout.embedding, layout.head].into_iter().flatten() {
        for n in 1..=layout.mtp.len() {
            let values = grads.of_use(id, n).f32().iter().map(|x| x.to_bits()).collect();
            all.insert(format!("{}, use {n}", layout.info(id).published[0].name), values);
        }
    }
    all
}

/// The dense gradients of one rank that takes the halves as two micro-batches.
fn in_turn(ctx: &Ctx, model: &Model, params: &Params, halves: [&Batch; 2]) -> Named {
    let mut grads = Grads::zeros(ctx, model.layout.clone());
    for batch in halves {
        let f = pass::forward(ctx, model, params, batch, &loss_weights(&model.config), None);
        pass::backward(ctx, model, params, f).run(ctx, params, &mut grads);
    }
    each_use(&mut grads)
}

/// What a reduction in the order of ranks gives.
fn sum_in_order(a: &Named, b: &Named) -> Named {
    let sum = |(x, y): (&u32, &u32)| (f32::from_bits(*x) + f32::from_bits(*y)).to_bits();
    a.iter().map(|(name, x)| (name.clone(), x.iter().zip(&b[name]).map(sum).collect())).collect()
}

/// Hidden states and log-probabilities, depth by depth.
fn forward_rows(ctx: &Ctx, model: &Model, params: &Params, batch: &Batch) -> Vec<(String, Vec<u32>)> {
    let logp = |k: usize, normed: &Shared| {
        let request = Request { targets: batch.depths[k].targets.clone(), temperature: 1.0, given: None, top_k: 0 };
        bits(&heads::forward(ctx, model, params, normed, request, k).logp)
    };
    let (h, ..) = trunk::forward(ctx, model, params, &batch.depths[0], Input::Tokens, Options::default());
    let (normed, _) = heads::final_norm(ctx, model, params, &h);
    let mut rows = vec![("hidden".into(), bits(&h)), ("log-probability".into(), logp(0, &normed))];
    let mut feed = if model.config.mtp_hidden == MtpHidden::PostNorm { normed } else { h };
    for k in 1..=model.layout.mtp.len() {
        let o = mtp::forward(ctx, model, params, k, &batch.depths[k], &feed, Options::default());
        rows.push((format!("hidden at depth {k}"), bits(&o.normed)));
        rows.push((format!("log-probability at depth {k}"), logp(k, &o.normed)));
        feed = o.feed;
    }
    rows
}

/// Nothing out of the ordinary.
fn even() -> Split {
    Split { lengths: [&[20], &[31]], shunned: 0..0, recompute: Recompute::default() }
}

/// The split under test: sequences of each rank, and experts whose correction bias keeps every token away.
struct Split {
    lengths: [&'static [usize]; 2],
    shunned: std::ops::Range<usize>,
    /// What the ranks compute again; one rank with everything keeps to the default.
    recompute: Recompute,
}

impl Split {
    fn weights(&self, ctx: &Ctx, model: &Model, precision: Precision) -> Params {
        let mut params = weights(ctx, model, precision);
        let layout = model.layout.clone();
        for (_, p) in layout.published().filter(|(t, _)| t.kind == Kind::Buffer) {
            params.master.view_mut().f32()[p.range()][self.shunned.clone()].fill(-10.0);
        }
        params
    }
}

fn pack(ctx: &Ctx, config: &ModelConfig, sequences: &[Sequence]) -> Batch {
    Batch::new(ctx, sequences, config.num_nextn_predict_layers)
}

fn on_ranks(config: &ModelConfig, precision: Precision, split: &Split, halves: &[Vec<Sequence>; 2]) -> Vec<Seen> {
    std::thread::scope(|s| {
        let rank = |(x, half): (hadal_comm::InProcess, &'_ Vec<Sequence>)| {
            let half = half.clone();
            s.spawn(move || {
                let ctx = context(1);
                let mut model = Model::new(&ctx, config.clone(), Scope::whole(config), Box::new(x));
                model.recompute = split.recompute;
                let params = split.weights(&ctx, &model, precision);
                observe(&ctx, &model, &params, &pack(&ctx, config, &half))
            })
        };
        let group = hadal_comm::group(2, config.n_routed_experts);
        let threads: Vec<_> = group.into_iter().zip(halves).map(rank).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn compare(ctx: &Ctx, case: &str, config: &ModelConfig, precision: Precision, split: &Split) {
    let halves = [0, 1].map(|r: usize| sequences(config, split.lengths[r], 3 + r as u64));
    let ranks = on_ranks(config, precision, split, &halves);
    let model = Model::whole(ctx, config.clone());
    let params = split.weights(ctx, &model, precision);
    let run = |s: &[Sequence]| observe(ctx, &model, &params, &pack(ctx, config, s));
    let whole = run(&halves.concat());
    assert_lively(case, &whole.gradients);

    for (i, (name, all)) in whole.rows.iter().enumerate() {
        let joined = [ranks[0].rows[i].1.as_slice(), &ranks[1].rows[i].1].concat();
        assert_same_bits(&format!("{case}: {name}"), &joined, all);
    }
    let experts: Named =
        whole.gradients.iter().filter(|(n, _)| routed(n)).map(|(n, g)| (n.clone(), g.clone())).collect();
    let mut held: Named = Named::new();
    for (rank, half) in ranks.iter().zip(&halves) {
        assert_eq!(rank.loads, whole.loads, "{case}: loads");
        let (local, dense): (Named, Named) = rank.gradients.clone().into_iter().partition(|(n, _)| routed(n));
        assert_eq!(local.len() * 2, experts.len(), "{case}: a rank holds half of the experts");
        held.extend(local);
        let alone: Named = run(half).gradients.into_iter().filter(|(n, _)| !routed(n)).collect();
        assert_same(&format!("{case}: dense gradients"), &dense, &alone);
    }
    assert_same(&format!("{case}: expert gradients"), &held, &experts);
    let packed = [0, 1].map(|r: usize| pack(ctx, config, &halves[r]));
    let reduced = sum_in_order(&ranks[0].unfolded, &ranks[1].unfolded);
    let one_rank = in_turn(ctx, &model, &params, [&packed[0], &packed[1]]);
    assert_same(&format!("{case}: dense gradients over ranks"), &reduced, &one_rank);
    let per_layer = whole.loads.chunks(config.n_routed_experts);
    let shunned = per_layer.flat_map(|l| &l[split.shunned.clone()]);
    assert!(shunned.clone().all(|&n| n == 0), "{case}: a shunned expert has rows");
    assert!(whole.loads.iter().sum::<i64>() > 0, "{case}: no expert has rows");
}

fn routed(name: &str) -> bool {
    name.contains(".mlp.experts.")
}

#[test]
fn unequal_parts_of_a_batch() {
    each_case(|ctx, case, config, precision| {
        compare(ctx, case, config, precision, &Split { lengths: [&[65, 1, 3], &[130]], ..even() });
    });
}

#[test]
fn experts_without_rows() {
    for precision in PRECISIONS {
        // One expert of the second rank, and all of the first rank's: the groups left over still fill the choice.
        for shunned in [6..7, 0..4] {
            let split = Split { lengths: [&[20, 45], &[1]], shunned, ..even() };
            let case = format!("{precision:?}, none to experts {:?}", split.shunned);
            compare(&context(2), &case, &v3_two_mtp(), precision, &split);
        }
    }
}

#[test]
fn a_rank_without_tokens_still_serves_its_experts() {
    for precision in PRECISIONS {
        let split = Split { lengths: [&[33, 9], &[]], ..even() };
        compare(&context(2), &format!("{precision:?}, a rank without tokens"), &v3(), precision, &split);
    }
}

#[test]
fn rows_sent_again_or_kept() {
    for (precision, recompute) in PRECISIONS.into_iter().flat_map(|p| Recompute::EACH.map(|r| (p, r))) {
        let split = Split { recompute, ..even() };
        compare(&context(2), &format!("{precision:?}, recompute {recompute}"), &v3_two_mtp(), precision, &split);
    }
}
