//! What the demo looks like: headings, explanations, and lines as they are typed on a host.
//!
//! ```text
//! == Direct routing: packets go to the real server as they are
//!    The real servers hold the VIP in silence and answer the client themselves.
//!
//!    director# ipvsadm -A -t 10.0.0.200:80 -s rr
//! ```
//!
//! Everything goes to the standard output, so that it stays in its order when it is kept in a file. Colours, and tables that are
//! drawn again in place, are for a terminal that can do so (not `TERM=dumb`); `NO_COLOR` leaves out the colours.

use std::{
    env,
    io::{self, IsTerminal as _},
    sync::LazyLock,
};

use super::lab::{Host, SERVERS};

/// Every line below a heading begins with this.
pub(super) const INDENT: &str = "   ";

/// How a piece of text looks on a terminal, as the parameters of its escape code.
#[derive(Clone, Copy)]
pub(super) enum Look {
    Bad,
    Command,
    Good,
    Heading,
    Host(Host),
}

impl Look {
    fn code(self) -> &'static str {
        match self {
            Self::Bad => "1;31",
            Self::Command => "1",
            Self::Good => "1;32",
            Self::Heading => "1;34",
            Self::Host(Host::Client) => "36",
            Self::Host(Host::Director) => "1;35",
            // The bars and the order of the answers have the same colours.
            Self::Host(host) => match SERVERS.iter().position(|server| *server == host) {
                Some(0) => "32",
                Some(1) => "33",
                Some(2) => "34",
                _ => "37",
            },
        }
    }
}

/// Whether somebody looks on, and what is on the screen can be changed.
pub(super) fn is_live() -> bool {
    static LIVE: LazyLock<bool> =
        LazyLock::new(|| io::stdout().is_terminal() && env::var_os("TERM").is_some_and(|terminal| terminal != "dumb"));
    *LIVE
}

/// Text with a look, if the screen has colours.
pub(super) fn paint(look: Look, text: &str) -> String {
    static COLOURS: LazyLock<bool> = LazyLock::new(|| is_live() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()));
    if *COLOURS && !text.is_empty() { format!("\x1b[{}m{text}\x1b[0m", look.code()) } else { text.to_owned() }
}

/// Prints what happens next, and why.
pub(super) fn heading(title: &str, explanation: &[&str]) {
    println!("\n{}", paint(Look::Heading, &format!("== {title}")));
    explain(explanation);
    println!();
}

/// Prints an explanation, line by line.
pub(super) fn explain(lines: &[&str]) {
    for line in lines {
        println!("{INDENT}{line}");
    }
}

/// Prints a line as it is typed on a host.
pub(super) fn prompt(host: Host, line: &str) {
    let name = paint(Look::Host(host), &format!("{}#", host.name()));
    println!("{INDENT}{name} {}", paint(Look::Command, line));
}

/// Prints what a program said.
pub(super) fn said(text: &str) {
    for line in text.trim_end().lines() {
        println!("{INDENT}{}", line.trim_end());
    }
}
