//! Templates of calls: what a service with `--pe sip` remembers, instead of ordinary [templates](crate::template).
//!
//! ```text
//! UDP 192.0.2.7 -> 10.0.0.200:5060, call a84b4c76e66710@pc33.example.org      leads to a real server
//! UDP 192.0.2.7 -> 10.0.0.200:5060, call 99a1@pc33.example.org                leads to another
//! ```
//!
//! As in IPVS the client's network is still part of the key: a call is kept together, and two clients with one Call-ID are two.
//! The key holds the whole text, so that two calls never meet. [`crate::sip`] finds it.
//!
//! A connection's key does not tell its call. So each connection of a call stands in a table of its own, as a [`Caller`], for the
//! sweep, which has to know whether a call has connections.

use crate::{sip, template::TemplateKey, wire::plain};

/// A Call-ID.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct CallId {
    /// The text; zeros behind it, because map keys are compared as bytes.
    text: [u8; sip::LONGEST],
    /// How long it is.
    pub length: u8,
}

impl CallId {
    /// None at all.
    pub const NONE: Self = Self { text: [0; sip::LONGEST], length: 0 };

    /// The Call-ID of this text. Nothing if that is empty or too long.
    pub fn new(text: &[u8]) -> Option<Self> {
        let mut call = Self::NONE;
        call.text.get_mut(..text.len())?.copy_from_slice(text);
        call.length = text.len() as u8;
        (call.length > 0).then_some(call)
    }

    /// The text.
    pub fn text(&self) -> &[u8] {
        self.text.get(..self.length.into()).unwrap_or_default()
    }
}

/// Whom the template of a call is for: the key of the table of calls.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct CallKey<A> {
    /// The client's network, and the service.
    pub whom: TemplateKey<A>,
    /// The call.
    pub call: CallId,
}

/// The call of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Caller<A> {
    /// Where the call's template is.
    pub key: CallKey<A>,
    /// When the connection was about to begin, in jiffies (the low 32 bits).
    pub since: u32,
}

plain! {
    CallId = 256,
    CallKey<crate::family::Ipv4> = 268,
    CallKey<crate::family::Ipv6> = 292,
    Caller<crate::family::Ipv4> = 272,
    Caller<crate::family::Ipv6> = 296,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_a_text() {
        let call = |text: &[u8]| CallId::new(text);
        assert_eq!(call(b"a@b").expect("a text").text(), b"a@b");
        assert_ne!(call(b"a"), call(b"a\0"));
        assert_eq!(call(&[b'x'; sip::LONGEST]).expect("the longest").text().len(), sip::LONGEST);
        assert_eq!((call(b""), call(&[b'x'; sip::LONGEST + 1])), (None, None));
    }
}
