//! How a test says that it, or a part of it, did not run.

use std::io::Write;

/// Reports on stderr, past the harness that keeps what passing tests print, that the calling test did not run, and why:
/// `skipped: <test>: <reason>`.
///
/// One write, because the harness writes to stdout meanwhile and both may be the same pipe: a line written in pieces,
/// as `eprintln!` writes it, would come out with a piece of the harness's in between.
#[track_caller]
pub fn skipped(reason: &str) {
    let (thread, at) = (std::thread::current(), std::panic::Location::caller());
    // On a single thread the harness runs tests on its own, which is not named after them.
    let test = thread.name().filter(|n| *n != "main").map_or_else(|| at.to_string(), str::to_owned);
    // Without a stderr there is no one to tell.
    let _ = std::io::stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes());
}
