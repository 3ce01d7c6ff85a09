//! Memory that this process has resident, where the system says so in a file (Linux).

/// Bytes now.
pub fn now() -> Option<u64> {
    status("VmRSS:")
}

/// The most bytes since [`forget`].
pub fn most() -> Option<u64> {
    status("VmHWM:")
}

/// Begins to look for the most bytes anew; None if the system does not let us.
pub fn forget() -> Option<()> {
    // 5 resets the peak alone (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5").ok()
}

fn status(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}
