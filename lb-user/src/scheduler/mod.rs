//! Schedulers: pure functions from real servers to the run that the kernel indexes.

/// A compiled schedule. See [`lb_common::schedule`] for the shape in memory.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Run {
    /// Cursor mode: where the cursor stood when the run was made.
    pub base: u32,
    /// Cursor mode: how many of the picks happen once, before the rest repeats.
    pub head: u32,
    /// Indices of real servers, [`lb_common::schedule::NOBODY`] where there is none; empty if nobody takes connections.
    pub picks: Vec<u32>,
}
