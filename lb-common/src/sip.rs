//! The Call-ID of a SIP message: what `--pe sip` keeps calls together by.
//!
//! ```text
//! INVITE sip:bob@example.org SIP/2.0
//! Via: SIP/2.0/UDP 192.0.2.7:5060;branch=z9hG4bK776asdhds
//! Call-ID: a84b4c76e66710@pc33.example.org              or, in short, "i: a84b4c76e66710@pc33.example.org"
//!          ------------------------------ this
//! ```
//!
//! A [`Search`] takes a message byte by byte and needs nothing but its last few numbers, so that a program in the kernel can lead
//! it through a packet. It finds what IPVS finds, to the byte, also where that is odd: a header is looked for in the body, too, and
//! the line behind an empty one that ends in a bare line feed is no beginning of a header.
//!
//! It does not understand SIP: neither whether the message is one, nor what else its headers say.

use crate::wire::plain;

/// The longest Call-ID that counts.
#[doc(alias = "IP_VS_PEDATA_MAXLEN")]
pub const LONGEST: usize = 255;

/// The header's long name, in lower case.
const NAME: &[u8; 7] = b"call-id";

/// A search through a message.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Search {
    /// How many bytes it has taken.
    position: u32,
    /// A [`State`].
    state: u32,
    /// How much of the header's name has been seen; then, where its value begins.
    start: u32,
    /// Where the search began anew after a header without a value.
    origin: u32,
}

plain! { Search = 16 }

/// What the last byte was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
enum State {
    /// Part of a line that does not matter.
    Text,
    /// A carriage return: a line feed may belong to it.
    Return,
    /// The end of a line.
    Line,
    /// Part of the long name.
    Name,
    /// The short name.
    Compact,
    /// The name, or a blank behind it.
    Before,
    /// The same, and a carriage return: the header may go on in the next line.
    BeforeReturn,
    /// The same, and the end of that line.
    BeforeFold,
    /// The same, and a blank in the next line.
    BeforeFolded,
    /// The colon, or a blank behind it; then as above.
    After,
    AfterReturn,
    AfterFold,
    AfterFolded,
    /// Part of the value.
    Word,
    /// The at sign in the value.
    At,
    /// Part of the value behind it.
    Host,
    /// Part of what is passed over.
    Skipped,
    /// The end of the value.
    Found,
    /// There is none.
    Lost,
}

impl State {
    const ALL: [Self; 19] = [
        Self::Text,
        Self::Return,
        Self::Line,
        Self::Name,
        Self::Compact,
        Self::Before,
        Self::BeforeReturn,
        Self::BeforeFold,
        Self::BeforeFolded,
        Self::After,
        Self::AfterReturn,
        Self::AfterFold,
        Self::AfterFolded,
        Self::Word,
        Self::At,
        Self::Host,
        Self::Skipped,
        Self::Found,
        Self::Lost,
    ];
}

impl Search {
    /// The beginning.
    pub const NEW: Self = Self { position: 0, state: State::Text as u32, start: 0, origin: 0 };

    /// How many bytes it has taken: the offset of the next.
    #[inline(always)]
    pub const fn position(&self) -> u32 {
        self.position
    }

    /// Whether the rest of the message does not matter.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        self.state >= State::Found as u32
    }

    /// Where the Call-ID is: its offset, and its length, which is 1 to [`LONGEST`].
    #[inline(always)]
    pub const fn found(&self) -> Option<(u32, u32)> {
        // The byte that ends it is taken.
        if self.state == State::Found as u32 { Some((self.start, self.position - 1 - self.start)) } else { None }
    }

    /// Takes the next eight bytes at once, as they stand in memory, if nothing is in them that matters.
    #[inline(always)]
    pub const fn pass(&mut self, bytes: u64) -> bool {
        let is_dull = self.state == State::Text as u32 && !has_byte(bytes, b'\r') && !has_byte(bytes, b'\n');
        if is_dull {
            self.position += 8;
        }
        is_dull
    }

    /// Takes the next byte.
    #[inline(always)]
    pub fn take(&mut self, byte: u8) {
        self.state = self.after(byte) as u32;
        self.position += 1;
    }

    #[inline(always)]
    fn after(&mut self, byte: u8) -> State {
        let state = State::ALL.get(self.state as usize).copied().unwrap_or(State::Lost);
        match state {
            State::Skipped if self.position < self.origin => State::Skipped,
            State::Text | State::Skipped => text(byte),
            State::Return if byte == b'\n' => State::Line,
            State::Return | State::Line => self.line(byte),
            State::Name if self.start < NAME.len() as u32 => self.name(byte),
            State::Compact if is_letter(byte) => State::Text,
            State::Name | State::Compact | State::Before => match byte {
                b' ' | b'\t' => State::Before,
                b'\r' => State::BeforeReturn,
                b'\n' => State::BeforeFold,
                b':' => State::After,
                _ => State::Lost,
            },
            State::BeforeReturn if byte == b'\n' => State::BeforeFold,
            State::BeforeReturn | State::BeforeFold => {
                if is_blank(byte) {
                    State::BeforeFolded
                } else {
                    State::Lost
                }
            }
            State::BeforeFolded => match byte {
                b' ' | b'\t' => State::BeforeFolded,
                b':' => State::After,
                _ => State::Lost,
            },
            State::After => match byte {
                b' ' | b'\t' => State::After,
                b'\r' => State::AfterReturn,
                b'\n' => State::AfterFold,
                _ => self.value(byte),
            },
            State::AfterReturn if byte == b'\n' => State::AfterFold,
            State::AfterReturn | State::AfterFold => {
                if is_blank(byte) {
                    State::AfterFolded
                } else {
                    State::Lost
                }
            }
            State::AfterFolded if is_blank(byte) => State::AfterFolded,
            State::AfterFolded => self.value(byte),
            State::Word if byte == b'@' => State::At,
            State::Word | State::Host if is_word(byte) => state,
            State::Word | State::Host => {
                let fits = self.position - self.start <= LONGEST as u32;
                if fits && (byte == b'\r' || byte == b'\n') { State::Found } else { State::Lost }
            }
            State::At if is_word(byte) => State::Host,
            State::At => self.miss(byte),
            State::Found | State::Lost => state,
        }
    }

    /// The first byte of a line. One that begins no name is never the end of the line, either.
    #[inline(always)]
    fn line(&mut self, byte: u8) -> State {
        match byte | 0x20 {
            b'c' => {
                self.start = 1;
                State::Name
            }
            b'i' => State::Compact,
            _ => State::Text,
        }
    }

    #[inline(always)]
    fn name(&mut self, byte: u8) -> State {
        let wanted = NAME.get(self.start as usize & 7).copied().unwrap_or(0);
        self.start += 1;
        // A hyphen has no upper case.
        if byte == wanted || wanted != b'-' && byte | 0x20 == wanted { State::Name } else { text(byte) }
    }

    #[inline(always)]
    fn value(&mut self, byte: u8) -> State {
        self.start = self.position;
        if is_word(byte) { State::Word } else { self.miss(byte) }
    }

    /// The header has no value: IPVS looks on, and adds up how far it has come.
    #[inline(always)]
    fn miss(&mut self, byte: u8) -> State {
        self.origin = self.origin.saturating_add(self.start);
        if self.position < self.origin { State::Skipped } else { text(byte) }
    }
}

#[inline(always)]
const fn text(byte: u8) -> State {
    match byte {
        b'\r' => State::Return,
        b'\n' => State::Line,
        _ => State::Text,
    }
}

#[inline(always)]
const fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// A letter, for the kernel one of Latin-1.
#[inline(always)]
const fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte >= 0xc0 && byte != 0xd7 && byte != 0xf7
}

/// A character of a "word" of SIP (RFC 3261, 25.1), with the kernel's letters.
#[inline(always)]
const fn is_word(byte: u8) -> bool {
    let set = match byte >> 6 {
        0 => WORDS[0],
        1 => WORDS[1],
        2 => 0,
        _ => WORDS[3],
    };
    set >> (byte & 63) & 1 != 0
}

/// A bit for each character of a word.
const WORDS: [u64; 4] = {
    let mut words = [0; 4];
    let mut byte = 0_u8;
    loop {
        let is_mark = matches!(
            byte,
            b'!' | b'"'
                | b'%'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'/'
                | b':'
                | b'<'
                | b'>'
                | b'?'
                | b'['
                | b'\\'
                | b']'
                | b'_'
                | b'`'
                | b'{'
                | b'}'
                | b'~'
        );
        if byte.is_ascii_digit() || is_letter(byte) || is_mark {
            words[byte as usize / 64] |= 1 << (byte % 64);
        }
        if byte == u8::MAX {
            break words;
        }
        byte += 1;
    }
};

const _: () = assert!(WORDS[2] == 0, "as `is_word` has it");

/// Whether one of eight bytes is this one.
#[inline(always)]
const fn has_byte(bytes: u64, byte: u8) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let zeros = bytes ^ (ONES * byte as u64);
    zeros.wrapping_sub(ONES) & !zeros & ONES << 7 != 0
}

#[cfg(test)]
mod tests;
