//! Instruction sets: one kernel source, instantiated per set, chosen at run time.

/// An instruction set that the running CPU has. Only detection builds one, so holding one is the
/// proof that its instructions may be executed.
///
/// The choice never changes a byte of output: a kernel is one piece of Rust for all of them, and
/// Rust neither reassociates nor contracts floating-point arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Isa(Level);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Level {
    /// What the target's baseline has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Work to be compiled once per instruction set. `run` and all that it calls in its hot loops must
/// be `#[inline(always)]`, or it keeps the baseline's instructions.
pub(crate) trait Kernel {
    fn run(self);
}

/// Calls `$kernel.run()` from a function compiled for `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! instantiate {
    ($kernel:expr, $features:literal) => {{
        #[target_feature(enable = $features)]
        // A kernel that another runs is a function of its own to keep its loops apart from the other's.
        #[inline(never)]
        fn compiled<K: Kernel>(kernel: K) {
            kernel.run();
        }
        // SAFETY: `compiled` needs a CPU with `$features`. The arm that expands this holds a level
        // that only `Isa::available` makes, after it has detected each of them, and a CPU keeps
        // its features while a process runs.
        unsafe { compiled($kernel) }
    }};
}

impl Isa {
    /// The widest instruction set of this CPU.
    pub fn detect() -> Self {
        *Self::available().last().expect("the baseline is always there")
    }

    /// Every instruction set of this CPU that kernels are compiled for, narrowest first.
    pub fn available() -> Vec<Self> {
        [Level::Baseline].into_iter().chain(detect_wider()).map(Self).collect()
    }

    /// `"baseline"`, `"avx2"` or `"avx512"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Runs `kernel` as compiled for this instruction set.
    #[cfg_attr(
        target_arch = "x86_64",
        expect(unsafe_code, reason = "calling a function compiled for more than the baseline")
    )]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Level::Baseline => kernel.run(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => instantiate!(kernel, "avx2"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => instantiate!(kernel, "avx512f,avx512bw,avx512vl,avx512dq"),
        }
    }
}

/// Asks for the cache lines of `data`, of at most two, without waiting for them.
#[inline(always)]
pub(crate) fn prefetch<T, const N: usize>(data: &[T; N]) {
    const LINE: usize = 64;
    let start = data.as_ptr().cast::<u8>();
    prefetch_line(start);
    if size_of_val(data) > LINE {
        prefetch_line(start.wrapping_add(LINE));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "an instruction by its name")]
fn prefetch_line(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: it reads nothing, faults nowhere, and belongs to every x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
#[expect(unsafe_code, reason = "an instruction by its name, which stable Rust has no function for")]
fn prefetch_line(line: *const u8) {
    // SAFETY: it reads nothing, faults nowhere, and belongs to every aarch64.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) line, options(nomem, nostack, preserves_flags));
    }
}

/// Nothing, where no instruction is known.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn prefetch_line(_: *const u8) {}

/// What the CPU has beyond the baseline.
#[cfg(target_arch = "x86_64")]
fn detect_wider() -> impl Iterator<Item = Level> {
    let avx2 = is_x86_feature_detected!("avx2");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    [avx2.then_some(Level::Avx2), avx512.then_some(Level::Avx512)].into_iter().flatten()
}

/// Nothing: elsewhere no kernel is compiled for more than the baseline.
#[cfg(not(target_arch = "x86_64"))]
fn detect_wider() -> [Level; 0] {
    []
}
