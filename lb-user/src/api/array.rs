//! An array that is longer than anybody wants to hold in memory: written and read element by element.
//!
//! ```text
//! daemon                                          command line
//! thread: [{…},{…} … ─> a few pieces ─> socket ─> piece ─> an element ─> visit
//! ```
//!
//! It is JSON like every other answer. The thread that writes waits while nobody reads, and ends when nobody will. If it fails
//! on the way, the answer breaks off: the status has been sent already.

use std::{
    fmt,
    io::{self, Read},
    ops::ControlFlow,
};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse as _, Response},
};
use futures_util::stream;
use serde::{
    Deserialize, Deserializer as _, Serialize,
    de::{SeqAccess, Visitor},
};
use tokio::sync::mpsc;
use tracing::error;

use crate::{datapath::Visit, director::model::ConnectionView};

/// Bytes in a piece, or a little more.
const PIECE: usize = 64 << 10;
/// Pieces that wait for a slow reader.
const PIECES: usize = 4;

/// Answers with the connections that a listing shows. It is made on a thread of its own.
pub(super) fn answer(listing: impl FnOnce(Visit<'_>) -> anyhow::Result<()> + Send + 'static) -> Response {
    let (sender, receiver) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut array = Writer { sender, piece: vec![b'['], is_first: true };
        match listing(&mut |view: ConnectionView| array.push(&view)) {
            Ok(()) => array.end(),
            Err(broken) => {
                error!("a listing of connections broke off: {broken:#}");
                // Nobody may be there any more.
                let _ = array.sender.blocking_send(Err(io::Error::other(broken)));
            }
        }
    });
    let pieces = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|piece| (piece, receiver)) });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(pieces)).into_response()
}

/// Writes an array.
struct Writer {
    sender: mpsc::Sender<io::Result<Bytes>>,
    piece: Vec<u8>,
    is_first: bool,
}

impl Writer {
    fn push(&mut self, element: &impl Serialize) -> ControlFlow<()> {
        if !std::mem::take(&mut self.is_first) {
            self.piece.push(b',');
        }
        // Writing to memory cannot fail, and a view has nothing that JSON has not.
        let _ = serde_json::to_writer(&mut self.piece, element);
        if self.piece.len() >= PIECE { self.send() } else { ControlFlow::Continue(()) }
    }

    fn send(&mut self) -> ControlFlow<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE + PIECE / 8));
        if self.sender.blocking_send(Ok(piece.into())).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn end(mut self) {
        self.piece.push(b']');
        // Nobody may be there any more.
        let _ = self.send();
    }
}

/// Reads an array, and calls `visit` with each element until it has enough. `true`: it was read to its end.
pub(super) fn read<T: for<'de> Deserialize<'de>>(
    source: impl Read,
    visit: &mut dyn FnMut(T) -> ControlFlow<()>,
) -> serde_json::Result<bool> {
    let mut enough = false;
    let elements = Elements { visit, enough: &mut enough };
    let mut deserializer = serde_json::Deserializer::from_reader(source);
    match deserializer.deserialize_seq(elements).and_then(|()| deserializer.end()) {
        // What follows is nobody's business any more.
        Err(_) if enough => Ok(false),
        outcome => outcome.map(|()| true),
    }
}

struct Elements<'a, T> {
    visit: &'a mut dyn FnMut(T) -> ControlFlow<()>,
    enough: &'a mut bool,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<'_, T> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(element) = elements.next_element()? {
            if (self.visit)(element).is_break() {
                *self.enough = true;
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_read_until_somebody_has_enough() {
        let sum = |text: &str, most: u32| {
            let mut sum = 0;
            let all = read(text.as_bytes(), &mut |number: u32| {
                sum += number;
                if sum < most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            all.map(|all| (sum, all)).ok()
        };
        assert_eq!(sum("[1,2,3]", 100), Some((6, true)));
        assert_eq!(sum("[]", 100), Some((0, true)));
        assert_eq!(sum("[1,2,3]", 3), Some((3, false)));
        assert_eq!(sum("[1,2", 100), None, "it broke off");
        assert_eq!(sum("[1,x]", 100), None);
    }
}
