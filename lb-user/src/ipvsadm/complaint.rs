//! What ipvsadm says when it does not like its command line, and the exit status that goes with it.
//!
//! The original has three schemes: 255 and a hint where to find help, 255 and the words of its option reader, and 2 with
//! a message of its own. `ipvsadm -R` goes on after the second kind, and ends after the others.

use super::{STATUS_REFUSED, STATUS_USAGE};

/// A complaint about the command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Complaint {
    /// The line does not begin with a command: where to find help.
    Hint,
    /// The reader could not go on at this word.
    Reader {
        /// The word of the command line.
        word: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Everything else.
    Usage(String),
}

/// What the reader of options may find.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    Unknown,
    MissingArgument,
    UnwantedArgument,
}

impl Complaint {
    /// A message of ipvsadm's own.
    pub(super) fn usage(text: &str) -> Self {
        Self::Usage(text.to_owned())
    }

    /// The message; `program` is the name that was typed.
    pub(super) fn text(&self, program: &str) -> String {
        match self {
            Self::Hint => format!("Try `{program} -h' or '{program} --help' for more information."),
            Self::Reader { word, fault } => {
                let fault = match fault {
                    Fault::Unknown => "unknown option",
                    Fault::MissingArgument => "missing argument",
                    Fault::UnwantedArgument => "option does not take an argument",
                };
                format!("{word}: {fault}")
            }
            Self::Usage(text) => text.clone(),
        }
    }

    /// The exit status.
    pub(super) const fn status(&self) -> u8 {
        match self {
            Self::Hint | Self::Reader { .. } => STATUS_REFUSED,
            Self::Usage(_) => STATUS_USAGE,
        }
    }

    /// Whether `ipvsadm -R` ends at a line with this complaint.
    pub(super) const fn ends_restore(&self) -> bool {
        !matches!(self, Self::Reader { .. })
    }
}
