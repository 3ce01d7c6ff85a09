use super::*;
use std::io::ErrorKind::StorageFull;
use std::io::Write;
use std::sync::Arc;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// A file appears whole, replaces an older one, and leaves nothing beside it, also when it cannot be written.
#[test]
fn files_are_replaced_whole() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("out.bin");
    std::fs::write(root.path().join(".out.bin.partial"), b"left by a killed writer").unwrap();
    for bytes in [&b"first"[..], b"second"] {
        Disk::new().replace(&path, bytes).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
    std::fs::create_dir_all(root.path().join("taken/full")).unwrap();
    let error = Disk::new().replace(&root.path().join("taken"), b"x").unwrap_err().to_string();
    assert!(error.contains("taken") && !error.contains('\n'), "{error}");
    assert_eq!(names(root.path()), ["out.bin", "taken"]);
    assert!(Disk::new().replace(Path::new("/"), b"x").is_err());
}

#[test]
fn what_was_written_is_what_a_checksum_finds() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a");
    let bytes: Vec<u8> = (0..1_000_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    let written = Disk::new().write_new(&path, |out| bytes.chunks(777).try_for_each(|c| out.write_all(c))).unwrap();
    assert_eq!(written.bytes, 1_000_000);
    assert_eq!(checksum(&path).unwrap(), written);
    let mut damaged = bytes;
    damaged[123_456] ^= 4;
    std::fs::write(&path, damaged).unwrap();
    assert_ne!(checksum(&path).unwrap(), written);
    let error = Disk::new().write_new(&path, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("writing") && !error.contains('\n'), "{error}");
}

/// What a save may leave, as the test below looks at it: nothing, the old, or the new.
fn save(disk: &Disk, root: &Path, content: &[u8]) -> Result<(), FileError> {
    let target = root.join("step");
    let staged = Staged::begin(disk, &target)?;
    for name in ["a", "b"] {
        staged.disk().write_new(&staged.path().join(name), |out| out.write_all(content))?;
    }
    if target.exists() {
        disk.remove_dir(&target)?;
    }
    staged.commit()?;
    disk.point(&root.join("latest"), "step")
}

/// A fault at every operation: the directory is whole or absent, nothing half-written has a name that counts, and the
/// next save mends it.
#[test]
fn every_operation_may_fail() {
    for fault in [Fault::Once(StorageFull), Fault::Full, Fault::Death] {
        let mut at = 0;
        loop {
            let root = tempfile::tempdir().unwrap();
            save(&Disk::new(), root.path(), b"old").unwrap();
            let faults = Arc::new(Faults::at(at, fault));
            let result = save(&Disk::with(faults.clone()), root.path(), b"new!");
            if result.is_ok() && faults.count() <= at {
                break;
            }
            let step = root.path().join("step");
            if step.exists() {
                assert_eq!(names(&step), ["a", "b"]);
                let a = std::fs::read(step.join("a")).unwrap();
                assert!(a == b"old" || a == b"new!");
                assert_eq!(std::fs::read(step.join("b")).unwrap(), a);
            }
            assert!(result.is_ok() || fault == Fault::Death || result.unwrap_err().why.kind() == StorageFull);
            let seen = names(root.path());
            assert!(seen.iter().all(|n| n.starts_with('.') || n == "step" || n == "latest"), "{seen:?}");
            Disk::new().sweep(root.path()).unwrap();
            assert!(names(root.path()).iter().all(|n| !n.starts_with('.')));
            save(&Disk::new(), root.path(), b"then").unwrap();
            assert_eq!(std::fs::read(root.path().join("latest/b")).unwrap(), b"then");
            assert_eq!(names(root.path()), ["latest", "step"]);
            at += 1;
        }
        assert!(at >= 15, "{at} operations");
    }
}

#[test]
fn one_holder_a_directory() {
    let root = tempfile::tempdir().unwrap();
    let lock = Lock::take(root.path()).unwrap().unwrap();
    assert_eq!(Lock::take(root.path()).unwrap().unwrap_err(), Some(std::process::id()));
    assert_eq!(lock.path(), root.path().join(".lock"));
    drop(lock);
    assert!(Lock::take(root.path()).unwrap().is_ok());
    assert!(Lock::take(&root.path().join("absent")).is_err());
}
