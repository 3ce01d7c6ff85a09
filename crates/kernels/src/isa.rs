//! The vector instruction sets that the CPU paths are compiled for, and the only place that asks which of them the CPU
//! has. A device carries one level ([`Isa`]) and its ops take it from there, so that what runs is known from outside:
//! the widest there is, what `HADAL_ISA` names, or what [`crate::Device::cpu_with`] was given.
//!
//! Two ways to compile one source for every level. [`vectorised`] takes plain loops, fuses and reorders nothing, and
//! gives the same bits on all. A [`Job`] is written in explicit vectors ([`Lanes`]) and fuses its multiply-adds where
//! the level does, so that its bits may differ from level to level, but never within one. AMX's tiles ([`Tiles`]) are a
//! world of their own.

mod lanes;
mod moves;
mod stream;
mod tiles;

use crate::DeviceError;
use std::sync::OnceLock;

pub(crate) use lanes::{Job, Lanes, TURNED, fma};
pub(crate) use moves::{
    Cache, LINE, SQUARE, ask, ask_for, finish_streams, interleave, pair_rows, prefetch, prefetch_line_to_write,
    round_row, stream_row, transpose, transpose_cells, transpose_halves,
};
pub(crate) use stream::{copied_rows, copy_rows, streamed};
pub(crate) use tiles::{TILE_COLUMNS, TILE_ROWS, TileJob, Tiles};

/// A level of vector instructions. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the build's target has: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// And AVX-512 BF16: products of bf16 take pairs of k at a time.
    Avx512Bf16,
    /// And AMX with BF16: products of bf16 on tiles.
    Amx,
}

impl Level {
    /// All there are, the narrowest first.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// As `HADAL_ISA` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }
}

/// A level that this CPU has: that one exists is what makes it sound to run code compiled for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa {
    level: Level,
    /// AMX's instructions are played by ordinary code: for tests where the CPU has none.
    emulated: bool,
}

/// What was found out about this CPU, once.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// The highest level there is.
    has: Level,
    /// The level used where none is named: vdpbf16ps is half as fast as f32 on Intel's first CPUs with it.
    best: Level,
    /// The CPU has AMX, but the kernel does not let this process use it.
    refused: bool,
}

fn found() -> Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    *FOUND.get_or_init(detect)
}

impl Found {
    /// Of vectors up to `vectors` and of AMX. `fast` says whether vdpbf16ps is worth its use.
    #[cfg(target_arch = "x86_64")]
    fn of(vectors: Level, amx: tiles::Permission, fast: bool) -> Self {
        let (has, best) = match (amx, vectors) {
            (tiles::Permission::Granted, _) => (Level::Amx, Level::Amx),
            (_, Level::Avx512Bf16) if !fast => (vectors, Level::Avx512),
            _ => (vectors, vectors),
        };
        Self { has, best, refused: amx == tiles::Permission::Refused }
    }

    fn notice(self) -> Option<String> {
        let best = self.best.name();
        self.refused.then(|| format!("this CPU has AMX, but the kernel refuses its use; going on with {best}"))
    }

    /// Why a level above `has` cannot be had.
    fn missing(self, level: Level) -> DeviceError {
        match level {
            Level::Amx if self.refused => DeviceError::RefusedIsa(level.name(), self.has.name()),
            _ => DeviceError::MissingIsa(level.name(), self.has.name()),
        }
    }
}

impl Isa {
    /// The level, if this CPU has it.
    pub fn new(level: Level) -> Option<Self> {
        (level <= found().has).then_some(Self { level, emulated: false })
    }

    /// The level that is fastest on this CPU.
    pub fn best() -> Self {
        Self { level: found().best, emulated: false }
    }

    /// The level that the environment variable `HADAL_ISA` names, the fastest if it is not set. It is read once.
    pub fn from_env() -> Result<Self, DeviceError> {
        static NAMED: OnceLock<Result<Isa, DeviceError>> = OnceLock::new();
        NAMED
            .get_or_init(|| match std::env::var_os("HADAL_ISA") {
                Some(name) => Self::named(&name.to_string_lossy()),
                None => Ok(Self::best()),
            })
            .clone()
    }

    /// What a user should know about the choice, if anything: that the kernel keeps AMX from this process.
    pub fn notice() -> Option<String> {
        // Who names a level does not ask what else there might have been.
        if std::env::var_os("HADAL_ISA").is_some() { None } else { found().notice() }
    }

    fn named(name: &str) -> Result<Self, DeviceError> {
        let level = Level::ALL.into_iter().find(|l| l.name() == name);
        let level = level.ok_or_else(|| DeviceError::UnknownIsa(name.into()))?;
        Self::new(level).ok_or_else(|| found().missing(level))
    }

    /// AMX whose instructions are emulated, on a CPU that has all the rest.
    #[cfg(test)]
    pub(crate) fn emulated_amx() -> Option<Self> {
        (found().has >= Level::Avx512Bf16).then_some(Self { level: Level::Amx, emulated: true })
    }

    /// Which one it is.
    #[inline(always)]
    pub fn level(self) -> Level {
        self.level
    }

    /// Does the job, compiled for this level.
    #[inline(always)]
    pub(crate) fn run<J: Job>(self, job: J) {
        #[cfg(target_arch = "x86_64")]
        match self.level {
            // SAFETY: this CPU has the level.
            Level::Amx | Level::Avx512Bf16 => return unsafe { lanes::x86::run_avx512bf16(job) },
            // SAFETY: as above.
            Level::Avx512 => return unsafe { lanes::x86::run_avx512(job) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { lanes::x86::run_avx2(job) },
            Level::Portable => {}
        }
        job.run::<lanes::Portable>();
    }

    /// Does the job on AMX's tiles; this level must be AMX.
    pub(crate) fn run_tiles(self, job: impl tiles::TileJob) {
        assert_eq!(self.level, Level::Amx, "tiles on {}", self.level.name());
        tiles::run(self.emulated, job);
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Found {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let bf16 = is_x86_feature_detected!("avx512bf16");
    let vectors = match (avx2, avx512, bf16) {
        (true, true, true) => Level::Avx512Bf16,
        (true, true, false) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        (false, ..) => Level::Portable,
    };
    let amx = if vectors == Level::Avx512Bf16 { tiles::permission() } else { tiles::Permission::NoAmx };
    Found::of(vectors, amx, lanes::x86::is_amd())
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Found {
    Found { has: Level::Portable, best: Level::Portable, refused: false }
}

/// Defines a function whose body is compiled once for every level; a call runs the one of the level it is given, its
/// first argument. The arithmetic is the same, and nothing is fused or reordered, so all of them give the same bits:
/// what the body sums, it must sum in lanes of its own. Type parameters are allowed, for elements.
macro_rules! vectorised {
    (
        $(#[$meta:meta])* $vis:vis fn $name:ident$(<$($elem:ident: $bound:path),+>)?(
            $isa:ident: Isa $(, $arg:ident: $ty:ty)* $(,)?
        ) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name$(<$($elem: $bound),+>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(unused_variables, reason = "few bodies look at the level")]
            fn body$(<$($elem: $bound),+>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512$(<$($elem: $bound),+>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
                    body$(::<$($elem),+>)?($isa, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$($elem: $bound),+>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
                    body$(::<$($elem),+>)?($isa, $($arg),*)
                }
                let level = $isa.level();
                if level >= $crate::isa::Level::Avx512 {
                    // SAFETY: an Isa is a level that this CPU has.
                    return unsafe { avx512$(::<$($elem),+>)?($isa, $($arg),*) };
                }
                if level >= $crate::isa::Level::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2$(::<$($elem),+>)?($isa, $($arg),*) };
                }
            }
            body$(::<$($elem),+>)?($isa, $($arg),*)
        }
    };
}
pub(crate) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::testing::isas;

    #[test]
    fn levels_are_named_and_each_includes_those_before() {
        assert!(Isa::new(Level::Portable).is_some());
        for level in Level::ALL {
            let found = Isa::named(level.name());
            match Isa::new(level) {
                Some(isa) => assert_eq!((isa.level(), found.unwrap()), (level, isa)),
                None => {
                    let e = found.unwrap_err().to_string();
                    let Found { has, refused, .. } = super::found();
                    let amx = "this CPU has AMX, but the kernel refuses its use; expected";
                    let why = if refused && level == Level::Amx { amx } else { "this CPU has" };
                    assert_eq!(e, format!("HADAL_ISA={}: {why} no more than {}", level.name(), has.name()));
                    assert!(level > has);
                }
            }
        }
    }

    struct Which<'a>(&'a mut Option<Level>);

    impl Job for Which<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            *self.0 = Some(V::LEVEL);
        }
    }

    #[test]
    fn a_job_runs_on_the_level_that_the_device_carries() {
        for isa in isas() {
            let device = Device::cpu_with(Some(1), isa).unwrap();
            let cpu = device.host();
            let mut found = None;
            cpu.isa().run(Which(&mut found));
            assert_eq!(found, Some(isa.level().min(Level::Avx512Bf16)));
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn amx_that_is_refused_is_done_without() {
        use super::tiles::Permission;
        let of = |amx, fast| Found::of(Level::Avx512Bf16, amx, fast);
        for (fast, best) in [(true, Level::Avx512Bf16), (false, Level::Avx512)] {
            let refused = of(Permission::Refused, fast);
            assert_eq!((refused.has, refused.best), (Level::Avx512Bf16, best));
            let expected = format!("this CPU has AMX, but the kernel refuses its use; going on with {}", best.name());
            assert_eq!(refused.notice(), Some(expected));
            let expected =
                "HADAL_ISA=amx: this CPU has AMX, but the kernel refuses its use; expected no more than avx512bf16";
            assert_eq!(refused.missing(Level::Amx).to_string(), expected);
            let expected = "HADAL_ISA=amx: this CPU has no more than avx512bf16";
            assert_eq!(of(Permission::NoAmx, fast).missing(Level::Amx).to_string(), expected);
            assert_eq!((of(Permission::NoAmx, fast).best, of(Permission::NoAmx, fast).notice()), (best, None));
            let granted = of(Permission::Granted, fast);
            assert_eq!((granted.has, granted.best, granted.notice()), (Level::Amx, Level::Amx, None));
        }
        // Without AVX-512 BF16 nobody asks for AMX.
        assert_eq!(Found::of(Level::Avx2, Permission::NoAmx, false).best, Level::Avx2);
    }

    #[test]
    fn an_unknown_name_is_refused() {
        for name in ["sse9", "", "AVX2"] {
            let e = Isa::named(name).unwrap_err().to_string();
            assert_eq!(e, format!("HADAL_ISA={name}: expected portable, avx2, avx512, avx512bf16 or amx"));
        }
    }
}
