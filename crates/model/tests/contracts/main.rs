//! The contracts that training in parts rests on, each proved to the bit on small random models: pipeline cuts,
//! deferred weight gradients, interleaved stages, experts over ranks, thread counts, batch invariance, routing replay.
//! Nothing here says that the numbers are right (the golden tests do); only that how the work is cut does not show.

mod alone;
mod balance;
mod cut;
mod deferred;
mod heads;
mod interleaved;
mod memory;
mod ranks;
mod recompute;
mod replay;
mod setup;
mod threads;
