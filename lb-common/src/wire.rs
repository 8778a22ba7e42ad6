//! Types that may be read from and written to raw bytes: headers, and what stands in BPF maps.

/// A type without padding and without invalid bit patterns, so that it may cross the border between kernel, userspace
/// and the wire as plain bytes.
///
/// # Safety
/// The type is `repr(C)`, has no implicit padding, and every bit pattern is a value of it.
#[expect(unsafe_code, reason = "the marker is a promise about layout that the compiler cannot check")]
pub unsafe trait Plain: Copy + 'static {}

/// The same bytes as another type.
#[inline(always)]
pub const fn cast<From: Plain, To: Plain>(bytes: From) -> To {
    const { assert!(size_of::<From>() == size_of::<To>()) };
    // SAFETY: as many bytes, and `Plain` says that they are all there and that any will do.
    #[expect(unsafe_code, reason = "what `Plain` promises")]
    unsafe {
        core::mem::transmute_copy(&bytes)
    }
}

macro_rules! primitive {
    ($($type:ty),+) => {$(
        #[expect(unsafe_code, reason = "an integer has no padding and no invalid pattern")]
        // SAFETY: as the reason says.
        unsafe impl Plain for $type {}
    )+};
}
primitive!(u8, u16, u32, u64);

#[expect(unsafe_code, reason = "an array of plain values has no padding of its own")]
// SAFETY: as the reason says.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Promises [`Plain`] for layouts of this crate and checks their size at compile time.
macro_rules! plain {
    ($($type:ty = $size:expr),+ $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        #[expect(unsafe_code, reason = "repr(C); the assertion above excludes padding: $size is the sum of the fields")]
        // SAFETY: `repr(C)`, integers only, and no padding by the size assertion.
        unsafe impl $crate::wire::Plain for $type {}
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya's marker for map keys and values, the same promise as `Plain`")]
        // SAFETY: as above.
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use plain;
