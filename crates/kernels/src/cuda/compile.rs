//! CUDA C++ to machine code by NVRTC, for the GPU at hand, once: the result is kept on disk under a hash of all that it
//! depends on. A cache that cannot be read or written costs time, never a run.

use super::{GpuError, error};
use cudarc::nvrtc::sys::{self, nvrtcResult};
use hadal_files::Disk;
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::OnceLock;
use xxhash_rust::xxh3::xxh3_128;

/// What a file of the cache begins with; another layout gets another number.
const MAGIC: &[u8; 8] = b"hadalcu1";

/// What NVRTC did not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompileError {
    #[error("compiling the kernels of {name} by NVRTC: {why}")]
    Call { name: String, why: String },
    #[error(
        "NVRTC {} does not compile the kernels of {name} (a GPU newer than it wants a newer CUDA): {log}",
        version()
    )]
    Source { name: String, log: String },
}

/// Refuses a system without NVRTC.
pub(super) fn present() -> Result<(), GpuError> {
    // SAFETY: loads the library, whose start-up code is the vendor's.
    if unsafe { sys::is_culib_present() } { Ok(()) } else { Err(GpuError::NoCompiler) }
}

/// What NVRTC is told for a GPU of compute capability `major`.`minor`; `own` is for the instructions that this one alone
/// has.
pub(super) fn options((major, minor): (u32, u32), own: bool) -> [String; 3] {
    let suffix = if own { "a" } else { "" };
    [
        format!("--gpu-architecture=sm_{major}{minor}{suffix}"),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
    ]
}

/// Machine code of a source, and why it could not be kept on disk, if it could not. Ends what is going on if the source
/// does not compile.
pub(super) fn cubin(name: &str, text: &str, options: &[String]) -> (Vec<u8>, Option<String>) {
    let made = cubin_in(folder(), name, text, options);
    made.unwrap_or_else(|e| error::fail(e.to_string()))
}

/// As [`cubin`], kept in `folder`.
fn cubin_in(
    folder: Option<PathBuf>,
    name: &str,
    text: &str,
    options: &[String],
) -> Result<(Vec<u8>, Option<String>), CompileError> {
    let mut key = format!("{name}\0{}\0", version()).into_bytes();
    for part in options.iter().map(String::as_str).chain([text]) {
        key.extend_from_slice(part.as_bytes());
        key.push(0);
    }
    let key = xxh3_128(&key);
    let path = folder.map(|dir| dir.join(format!("{name}-{key:032x}.cubin")));
    if let Some(code) = path.as_ref().and_then(|p| read(p, key)) {
        return Ok((code, None));
    }
    let code = compile(name, text, options)?;
    let kept = match &path {
        Some(path) => write(path, key, &code),
        None => Err("neither HADAL_CACHE, XDG_CACHE_HOME nor HOME names a folder".into()),
    };
    Ok((code, kept.err()))
}

/// Where compiled kernels are kept.
fn folder() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let own = var("HADAL_CACHE");
    let system = || var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache"))).map(|dir| dir.join("hadal"));
    own.or_else(system).map(|dir| dir.join("kernels"))
}

/// The code in a file of the cache, if the file is whole and is of this key.
fn read(path: &std::path::Path, key: u128) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (head, code) = bytes.split_at_checked(MAGIC.len() + 32)?;
    (head == header(key, code)).then(|| code.to_vec())
}

fn write(path: &std::path::Path, key: u128, code: &[u8]) -> Result<(), String> {
    let disk = Disk::new();
    if let Some(dir) = path.parent() {
        disk.create_dir(dir).map_err(|e| e.to_string())?;
    }
    disk.replace(path, &[&header(key, code)[..], code].concat()).map_err(|e| e.to_string())
}

fn header(key: u128, code: &[u8]) -> Vec<u8> {
    [&MAGIC[..], &key.to_le_bytes(), &xxh3_128(code).to_le_bytes()].concat()
}

/// NVRTC's version: another compiler makes other code.
fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        let asked = check("nvrtc", unsafe { sys::nvrtcVersion(&mut major, &mut minor) });
        asked.map_or_else(|e| error::fail(e.to_string()), |()| format!("{major}.{minor}"))
    })
}

fn check(name: &str, result: nvrtcResult) -> Result<(), CompileError> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a static string that ends in zero.
    let why = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(CompileError::Call { name: name.into(), why: why.to_string_lossy().into_owned() })
}

fn zero_ended(s: &str) -> CString {
    CString::new(s).unwrap_or_else(|_| panic!("a source or an option of NVRTC holds a zero: {s:?}"))
}

/// A program of NVRTC, destroyed on every way out.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `compile`, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// Machine code of a source.
pub(super) fn compile(name: &str, text: &str, options: &[String]) -> Result<Vec<u8>, CompileError> {
    let (source, file) = (zero_ended(text), zero_ended(&format!("{name}.cu")));
    let mut raw = std::ptr::null_mut();
    let none = std::ptr::null();
    // SAFETY: the strings end in zero and outlive the call; no headers are given.
    check(name, unsafe { sys::nvrtcCreateProgram(&mut raw, source.as_ptr(), file.as_ptr(), 0, none, none) })?;
    let program = Program(raw);
    let options: Vec<CString> = options.iter().map(|o| zero_ended(o)).collect();
    let pointers: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    // SAFETY: as many pointers as said, to strings that outlive the call.
    let result = unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr()) };
    if result != nvrtcResult::NVRTC_SUCCESS {
        return Err(CompileError::Source { name: name.into(), log: log(name, &program)? });
    }
    let mut size = 0;
    // SAFETY: writes one number; then as many bytes as the buffer has.
    unsafe {
        check(name, sys::nvrtcGetCUBINSize(program.0, &mut size))?;
        let mut code = vec![0u8; size];
        check(name, sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()))?;
        Ok(code)
    }
}

/// What the compiler says, on one line.
fn log(name: &str, program: &Program) -> Result<String, CompileError> {
    let mut size = 0;
    // SAFETY: writes one number; then as many bytes as the buffer has.
    let bytes = unsafe {
        check(name, sys::nvrtcGetProgramLogSize(program.0, &mut size))?;
        let mut log = vec![0u8; size];
        check(name, sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()))?;
        log
    };
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.trim_end_matches('\0').split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::skipped;

    #[test]
    fn only_a_whole_file_of_the_same_key_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/x.cubin");
        assert!(read(&path, 7).is_none());
        write(&path, 7, b"code").unwrap();
        assert_eq!(read(&path, 7).unwrap(), b"code");
        assert!(read(&path, 8).is_none());
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(read(&path, 7).is_none(), "{cut} bytes");
        }
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert!(read(&path, 7).is_none());
        write(&path, 7, b"code").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // A folder that cannot be made is an error that names it.
        let message = write(&path.join("x.cubin"), 7, b"code").unwrap_err();
        assert!(message.contains("x.cubin"), "{message}");
    }
    /// A cache that is damaged or cannot be made costs a compilation, never a run.
    #[test]
    fn without_a_usable_cache_kernels_are_compiled() {
        if present().is_err() {
            return skipped("no NVRTC");
        }
        let dir = tempfile::tempdir().unwrap();
        let text = "extern \"C\" __global__ void one(float* x) { *x = 1.0f; }";
        let options = options((8, 0), false);
        let make = |folder: Option<PathBuf>| cubin_in(folder, "one", text, &options).unwrap();
        let kept = || Some(dir.path().join("kernels"));
        let (code, why) = make(kept());
        assert_eq!(why, None);
        let files = || std::fs::read_dir(kept().unwrap()).unwrap().map(|f| f.unwrap().path()).collect::<Vec<_>>();
        let [path] = &files()[..] else { panic!("{:?}", files()) };
        let whole = std::fs::read(path).unwrap();
        // What is there is taken: a file of this key with other code, whole by its sums.
        let key = u128::from_le_bytes(whole[MAGIC.len()..MAGIC.len() + 16].try_into().unwrap());
        write(path, key, b"other").unwrap();
        assert_eq!(make(kept()), (b"other".to_vec(), None));
        for damaged in [&b""[..], &whole[..whole.len() / 2], &[&whole[..whole.len() - 1], b"?"].concat()] {
            std::fs::write(path, damaged).unwrap();
            assert_eq!(make(kept()), (code.clone(), None));
            assert_eq!(std::fs::read(path).unwrap(), whole, "mended");
        }
        // A file where a folder would have to be, and no folder at all.
        let (again, why) = make(Some(path.join("kernels")));
        assert_eq!(again, code);
        assert!(why.unwrap().contains("one-"));
        let (again, why) = make(None);
        assert_eq!(again, code);
        assert!(why.unwrap().contains("HADAL_CACHE"));
    }

    #[test]
    fn what_does_not_compile_is_one_line() {
        if present().is_err() {
            return skipped("no NVRTC");
        }
        let e = compile("broken", "extern \"C\" __global__ void f() { x = 1; }", &options((9, 0), true)).unwrap_err();
        let e = e.to_string();
        assert!(e.contains("kernels of broken") && e.contains("\"x\" is undefined") && !e.contains('\n'), "{e}");
    }
}
