//! Atomic additions, an or, and compare and swap.
//!
//! Written in assembly: LLVM 22 turns a relaxed `atomicrmw add` whose result is used into an addition that does not
//! fetch, and `core::sync::atomic` has no such operations on this target. Needs BPF's instruction set v3 (kernel 5.12).

/// Adds to a word in memory that others change at the same time, and returns what stood there before.
///
/// # Safety
/// `word` points at an element of a map.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, addend: u64) -> u64 {
    let mut value = addend;
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("{value} = atomic_fetch_add((u64 *)({word} + 0), {value})", value = inout(reg) value, word = in(reg) word);
    }
    value
}

/// Adds to a word in memory that others change at the same time.
///
/// # Safety
/// `word` points at an element of a map.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn add(word: *mut u64, addend: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) += {addend}", word = in(reg) word, addend = in(reg) addend);
    }
}

/// Puts a word where another stands, if it still stands there. Returns what stood there before.
///
/// # Safety
/// `word` points into an element of a map, and is aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let mut found = old;
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("r0 = cmpxchg_64({word} + 0, r0, {new})", inout("r0") found, word = in(reg) word, new = in(reg) new);
    }
    found
}

/// Sets bits of a word in memory that others change at the same time.
///
/// # Safety
/// `word` points at memory that the program may write.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn or(word: *mut u64, bits: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) |= {bits}", word = in(reg) word, bits = in(reg) bits);
    }
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn compare_exchange(_: *mut u64, _: u64, _: u64) -> u64 {
    unreachable!("BPF only")
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn or(_: *mut u64, _: u64) {
    unreachable!("BPF only")
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn fetch_add(_: *mut u64, _: u64) -> u64 {
    unreachable!("BPF only")
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn add(_: *mut u64, _: u64) {
    unreachable!("BPF only")
}
