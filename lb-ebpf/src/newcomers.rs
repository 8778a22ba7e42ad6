//! Which tables have got entries since the sweep last looked.
//!
//! To walk through a large table takes a tenth of a second even if nothing is in it, and no slice of that walk ends before there is an
//! entry. So the sweep leaves out tables that it found empty, unless somebody has come since. Whoever inserts an entry says so here,
//! afterwards; the sweep takes the word back before it walks. A word that is set already is only read, by all CPUs at once.

use lb_common::config::SweptTable;

use crate::maps::NEWCOMERS;

/// Somebody has come to a table.
#[inline(always)]
pub fn note(table: SweptTable) {
    let Some(word) = NEWCOMERS.get_ptr_mut(table as u32) else { return };
    // SAFETY: an element of the array; every writer but the sweep writes the same.
    unsafe {
        if word.read_volatile() == 0 {
            word.write_volatile(1);
        }
    }
}
