//! The vector instruction sets that the CPU paths are compiled for, and the only place that asks which of them the CPU
//! has. A device carries one level ([`Isa`]) and its ops take it from there, so that what runs is known from outside:
//! the widest there is, what `HADAL_ISA` names, or what [`crate::Device::cpu_with`] was given.
//!
//! Two ways to compile one source for every level. [`vectorised`] takes plain loops, fuses and reorders nothing, and
//! gives the same bits on all. A [`Job`] is written in explicit vectors ([`Lanes`]) and fuses its multiply-adds where
//! the level does, so that its bits may differ from level to level, but never within one.
//!
//! The microkernels of the `gemm` crate detect what the CPU has by themselves and cannot be held to a level; our own
//! will take their place. All else obeys.

mod lanes;
mod moves;

use crate::DeviceError;
use std::sync::OnceLock;

pub(crate) use lanes::{Job, Lanes, fma};
pub(crate) use moves::{SQUARE, prefetch, transpose};

/// A level of vector instructions. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the build's target has: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// All there are, the narrowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// As `HADAL_ISA` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// A level that this CPU has: that one exists is what makes it sound to run code compiled for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// The level, if this CPU has it.
    pub fn new(level: Level) -> Option<Self> {
        (level <= Self::widest().0).then_some(Self(level))
    }

    /// The widest level this CPU has.
    pub fn widest() -> Self {
        static WIDEST: OnceLock<Isa> = OnceLock::new();
        *WIDEST.get_or_init(|| Self(detect()))
    }

    /// The level that the environment variable `HADAL_ISA` names, the widest if it is not set. It is read once.
    pub fn from_env() -> Result<Self, DeviceError> {
        static NAMED: OnceLock<Result<Isa, DeviceError>> = OnceLock::new();
        NAMED
            .get_or_init(|| match std::env::var_os("HADAL_ISA") {
                Some(name) => Self::named(&name.to_string_lossy()),
                None => Ok(Self::widest()),
            })
            .clone()
    }

    fn named(name: &str) -> Result<Self, DeviceError> {
        let level = Level::ALL.into_iter().find(|l| l.name() == name);
        let level = level.ok_or_else(|| DeviceError::UnknownIsa(name.into()))?;
        Self::new(level).ok_or_else(|| DeviceError::MissingIsa(level.name(), Self::widest().0.name()))
    }

    /// Which one it is.
    #[inline(always)]
    pub fn level(self) -> Level {
        self.0
    }

    /// The level may use vdpbf16ps and this CPU has it.
    pub(crate) fn has_bf16_dot(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 >= Level::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Does the job, compiled for this level.
    #[inline(always)]
    pub(crate) fn run<J: Job>(self, job: J) {
        #[cfg(target_arch = "x86_64")]
        match self.0 {
            // SAFETY: this CPU has the level.
            Level::Avx512 => return unsafe { lanes::x86::run_avx512(job) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { lanes::x86::run_avx2(job) },
            Level::Portable => {}
        }
        job.run::<lanes::Portable>();
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, _) => Level::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Defines a function whose body is compiled once for every level; a call runs the one of the level it is given, its
/// first argument. The arithmetic is the same, and nothing is fused or reordered, so all of them give the same bits:
/// what the body sums, it must sum in lanes of its own. One type parameter is allowed, for the element.
macro_rules! vectorised {
    (
        $(#[$meta:meta])* $vis:vis fn $name:ident$(<$elem:ident: $bound:path>)?(
            $isa:ident: Isa $(, $arg:ident: $ty:ty)* $(,)?
        ) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name$(<$elem: $bound>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(unused_variables, reason = "few bodies look at the level")]
            fn body$(<$elem: $bound>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512$(<$elem: $bound>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
                    body($isa, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$elem: $bound>)?($isa: Isa, $($arg: $ty),*) $(-> $ret)? {
                    body($isa, $($arg),*)
                }
                match $isa.level() {
                    // SAFETY: an Isa is a level that this CPU has.
                    $crate::isa::Level::Avx512 => return unsafe { avx512($isa, $($arg),*) },
                    // SAFETY: as above.
                    $crate::isa::Level::Avx2 => return unsafe { avx2($isa, $($arg),*) },
                    $crate::isa::Level::Portable => {}
                }
            }
            body($isa, $($arg),*)
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
                    let has = Isa::widest().level().name();
                    assert_eq!(e, format!("HADAL_ISA={}: this CPU has no more than {has}", level.name()));
                    assert!(level > Isa::widest().level());
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
            let Device::Cpu(cpu) = Device::cpu_with(Some(1), isa).unwrap();
            let mut found = None;
            cpu.isa().run(Which(&mut found));
            assert_eq!(found, Some(isa.level()));
        }
    }

    #[test]
    fn an_unknown_name_is_refused() {
        for name in ["sse9", "", "AVX2"] {
            let e = Isa::named(name).unwrap_err().to_string();
            assert_eq!(e, format!("HADAL_ISA={name}: expected portable, avx2 or avx512"));
        }
    }
}
