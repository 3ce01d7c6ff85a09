//! A GPU that fails in the midst of a run, by a driver that is not real: what is said, and what is left.

use crate::device::fake_driver;
use crate::support::{Place, Ran, succeeds};
use std::process::Command;

/// A place with a GPU of compute capability 8.0.
fn place() -> Place {
    let place = Place::new();
    fake_driver(&place);
    for other in ["libnvrtc.so", "libcublasLt.so"] {
        std::fs::copy(place.path("libcuda.so"), place.path(other)).unwrap();
    }
    place
}

/// Runs `hadal` there, where `fails` says what fails.
fn hadal(place: &Place, args: &[String], fails: &str, sync: bool) -> Ran {
    let out = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(args)
        .env("LD_LIBRARY_PATH", place.arg(""))
        .env("HADAL_CACHE", place.arg("cache"))
        .env("FAKE_CUDA", "13000 1 8 0 0")
        .env("FAKE_CUDA_FAILS", fails)
        .env("HADAL_CUDA_SYNC", if sync { "1" } else { "0" })
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

/// The one line of a failure, without what every one has.
#[track_caller]
fn failure(ran: &Ran) -> &str {
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let mut errors = ran.stderr.lines().filter(|l| !l.starts_with('['));
    let (line, rest) = (errors.next().unwrap_or_default(), errors.next());
    assert_eq!(rest, None, "{}", ran.stderr);
    let said = line.strip_prefix("error: GPU 0 (Fake 1000): waiting for the device: ");
    let said = said.and_then(|s| s.strip_prefix("an error that is not real (FAKE_ERROR); launched last: "));
    said.unwrap_or_else(|| panic!("{line}"))
}

const HINT: &str = " (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)";

/// Checkpoints of the steps before the failure are there and can be gone on from, on another device too.
#[test]
fn a_run_goes_on_from_the_checkpoint_before_a_failure() {
    let place = place();
    let more = ["--device", "cuda", "--steps", "9", "--checkpoint-every", "3", "--eval-every", "9"];
    let args = place.pretrain("out", &more);
    // Step 1 is launched; step 2 and those after it are replayed.
    let ran = hadal(&place, &args, "replay 6", false);
    let said = failure(&ran);
    assert!(said.contains("replays of a recorded step of ") && said.contains(" of rmsnorm forward"), "{said}");
    assert!(said.ends_with(HINT), "{said}");
    let steps = |step: usize| place.path(&format!("out/step-{step:06}")).exists();
    assert_eq!([3, 6, 9].map(steps), [true, true, false]);
    let ran = succeeds(&["pretrain", "--resume", "--out", &place.arg("out")]);
    assert!(ran.stdout.contains("going on after step 6 from "), "{}", ran.stdout);
    assert!(steps(9));
}

#[test]
fn a_failure_names_the_launch_if_each_is_waited_for() {
    let place = place();
    let args = |out: &str| place.pretrain(out, &["--device", "cuda", "--steps", "4"]);
    let ran = hadal(&place, &args("out"), "kernel 30", false);
    let several = failure(&ran);
    assert!(several.matches(", grid [").count() > 1 && several.ends_with(HINT), "{several}");
    let ran = hadal(&place, &args("other"), "kernel 30", true);
    let one = failure(&ran);
    assert!(one.matches(", grid [").count() == 1 && one.ends_with(']') && one.contains("16["), "{one}");
}
