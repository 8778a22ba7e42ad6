//! The table of who answered.
//!
//! ```text
//! server1  10.0.0.205  weight 2    8  ###############
//! server2  10.0.0.206  weight 1    4  #######
//! server3  10.0.0.208  weight 1    4  #######
//! 16 requests, in this order: 3 2 1 1 3 2 1 1 3 2 1 1 3 2 1 1
//! ```
//!
//! On a terminal it is drawn again in place after every request; elsewhere it is printed once, at the end.

use std::io::{self, Write as _};

use super::{
    lab::{Family, SERVERS},
    promise::Promise,
    screen::{INDENT, Look, is_live, paint},
};

/// How many answers are shown in their order.
const RECENT: usize = 16;

/// How wide a bar is when one real server answers everything.
const BAR: usize = 30;

/// The answers so far, and what was promised about them.
pub(super) struct Table<'a> {
    promise: &'a Promise,
    family: Family,
    answers: Vec<Option<usize>>,
    /// How many lines of the screen belong to the table.
    drawn: usize,
}

impl<'a> Table<'a> {
    pub(super) fn new(promise: &'a Promise, family: Family) -> Self {
        Self { promise, family, answers: Vec::new(), drawn: 0 }
    }

    /// Adds an answer and shows it.
    pub(super) fn add(&mut self, answer: Option<usize>) {
        self.answers.push(answer);
        if is_live() {
            self.draw();
        }
    }

    /// Whether the answers are a whole number of the scheduler's periods.
    pub(super) fn is_whole(&self) -> bool {
        !self.answers.is_empty() && self.answers.len().is_multiple_of(self.promise.period())
    }

    /// Prints whether the promise was kept, and returns it.
    pub(super) fn verdict(&mut self) -> bool {
        if !is_live() {
            self.draw();
        }
        let weights = self.promise.weights.map(|weight| weight.to_string()).join(":");
        let promised = format!("{} with the weights {weights}", self.promise.scheduler);
        let checked = self.promise.check(&self.answers);
        match &checked {
            Ok(()) => println!("{INDENT}{} this is what {promised} promises.", paint(Look::Good, "Right:")),
            Err(reason) => println!("{INDENT}{} this is not what {promised} promises: {reason}.", paint(Look::Bad, "WRONG:")),
        }
        checked.is_ok()
    }

    fn draw(&mut self) {
        let lines = self.lines();
        let mut screen = lines.iter().fold(String::new(), |screen, line| screen + INDENT + line + "\n");
        if is_live() {
            // Up to the table's first line, and clear from there; a narrow terminal cuts lines off instead of folding them.
            let up = if self.drawn > 0 { format!("\x1b[{}A\x1b[J", self.drawn) } else { String::new() };
            screen = format!("{up}\x1b[?7l{screen}\x1b[?7h");
        }
        self.drawn = lines.len();
        let mut output = io::stdout().lock();
        // Whoever closed the terminal does not miss the table.
        let _ = output.write_all(screen.as_bytes()).and_then(|()| output.flush());
    }

    fn lines(&self) -> Vec<String> {
        let total = self.answers.len();
        let width = SERVERS.iter().map(|server| server.address(self.family).len()).max().unwrap_or_default();
        let mut lines: Vec<_> = SERVERS
            .iter()
            .enumerate()
            .map(|(index, server)| {
                let count = self.answers.iter().filter(|answer| **answer == Some(index)).count();
                let bar = paint(Look::Host(*server), &"#".repeat((count * BAR).checked_div(total).unwrap_or(0)));
                let name = paint(Look::Host(*server), server.name());
                let weight = self.promise.weights[index];
                let line = format!("{name}  {:<width$}  weight {weight} {count:>4}  {bar}", server.address(self.family));
                line.trim_end().to_owned()
            })
            .collect();
        let recent: Vec<_> = self.answers[total.saturating_sub(RECENT)..].iter().map(|answer| short(*answer)).collect();
        let order = if total > RECENT { "the last in this order" } else { "in this order" };
        lines.push(format!("{total} requests, {order}: {}", recent.join(" ")));
        lines
    }
}

/// The number of the real server that answered.
fn short(answer: Option<usize>) -> String {
    match answer {
        Some(index) => paint(Look::Host(SERVERS[index]), &(index + 1).to_string()),
        None => paint(Look::Bad, "-"),
    }
}
