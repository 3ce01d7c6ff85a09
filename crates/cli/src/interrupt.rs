//! Ctrl-C and SIGTERM during a run: the first asks it to save and leave, the second leaves at once. What is on disk is
//! whole either way, since checkpoints get their name last. SIGHUP is left alone: whoever wants a run to outlive its
//! terminal says so with nohup. Where there are no such signals, Ctrl-C leaves at once.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

/// The signal that asked the run to stop, 0 before it.
static STOP: AtomicU8 = AtomicU8::new(0);
static SAVES: AtomicBool = AtomicBool::new(false);

/// True once the run is to save and leave.
pub fn stop() -> bool {
    STOP.load(Relaxed) != 0
}

/// Exit code of a run that was told to stop, as shells have it: 128 + the signal, so 130 for Ctrl-C, 143 for SIGTERM.
pub fn code() -> u8 {
    128 + STOP.load(Relaxed)
}

/// While this lives, the first signal only asks.
pub struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        SAVES.store(false, Relaxed);
    }
}

/// Takes the signals over.
pub fn watch() -> std::io::Result<Guard> {
    SAVES.store(true, Relaxed);
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let signal = signal as u8; // 2 or 15.
                if !SAVES.load(Relaxed) || STOP.swap(signal, Relaxed) != 0 {
                    std::process::exit((128 + signal).into());
                }
                eprintln!("[stopping after this step; once more leaves at once, without saving]");
            }
        })?;
    }
    Ok(Guard(()))
}
