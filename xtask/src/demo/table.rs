//! The table of who answered.
//!
//! On a terminal it is drawn again in place after every request; elsewhere every request is one line, and the table stands
//! at the end.

use std::io::{self, IsTerminal as _, Write as _};

use super::{lab::SERVERS, promise::Promise};

/// How many answers are shown in their order.
const RECENT: usize = 12;

/// How wide a bar is when one real server answers everything.
const BAR: usize = 40;

/// The answers so far, and what was promised about them.
pub(super) struct Table<'a> {
    promise: &'a Promise,
    answers: Vec<Option<usize>>,
    live: bool,
    /// How many lines of the screen belong to the table.
    drawn: usize,
}

impl<'a> Table<'a> {
    pub(super) fn new(promise: &'a Promise) -> Self {
        Self { promise, answers: Vec::new(), live: io::stdout().is_terminal(), drawn: 0 }
    }

    /// Adds an answer and shows it.
    pub(super) fn add(&mut self, answer: Option<usize>) {
        self.answers.push(answer);
        if self.live {
            self.draw();
        } else {
            println!("  request {:>3}: {}", self.answers.len(), name(answer));
        }
    }

    /// Whether the answers are a whole number of the scheduler's periods.
    pub(super) fn is_whole(&self) -> bool {
        !self.answers.is_empty() && self.answers.len().is_multiple_of(self.promise.period())
    }

    /// Prints whether the promise was kept, and returns it.
    pub(super) fn verdict(&mut self) -> bool {
        if !self.live {
            self.draw();
        }
        let weights = self.promise.weights.map(|weight| weight.to_string()).join(":");
        let promised = format!("{} with the weights {weights}", self.promise.scheduler);
        match self.promise.check(&self.answers) {
            Ok(()) => println!("  This is what {promised} promises."),
            Err(reason) => println!("  This is NOT what {promised} promises: {reason}."),
        }
        self.promise.check(&self.answers).is_ok()
    }

    fn draw(&mut self) {
        let lines = self.lines();
        let mut screen = if self.drawn > 0 { format!("\x1b[{}A", self.drawn) } else { String::new() };
        for line in &lines {
            screen += if self.live { "\x1b[2K" } else { "" };
            screen += line;
            screen += "\n";
        }
        self.drawn = lines.len();
        let mut output = io::stdout().lock();
        // Whoever closed the terminal does not miss the table.
        let _ = output.write_all(screen.as_bytes()).and_then(|()| output.flush());
    }

    fn lines(&self) -> Vec<String> {
        let total = self.answers.len();
        let mut lines: Vec<_> = SERVERS
            .iter()
            .enumerate()
            .map(|(index, server)| {
                let count = self.answers.iter().filter(|answer| **answer == Some(index)).count();
                let bar = "#".repeat((count * BAR).checked_div(total).unwrap_or(0));
                let weight = self.promise.weights[index];
                format!("  {} {:<11} weight {weight} {count:>5} {bar}", server.name(), server.address())
            })
            .collect();
        let recent: Vec<_> = self.answers[total.saturating_sub(RECENT)..].iter().map(|answer| short(*answer)).collect();
        lines.push(format!("  {total} requests, answered by ...{}", recent.join(" ")));
        lines
    }
}

fn name(answer: Option<usize>) -> &'static str {
    answer.map_or("no answer", |index| SERVERS[index].name())
}

fn short(answer: Option<usize>) -> String {
    answer.map_or_else(|| "-".to_owned(), |index| (index + 1).to_string())
}
