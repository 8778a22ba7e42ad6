//! What a command has to say, for people and as JSON.

use std::fmt;

use serde::Serialize;

use super::toa::Watched;

/// The outcome of a command.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whose programs see clients behind FULLNAT, if that was asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub toa: Vec<Watched>,
    /// What was changed.
    pub changes: Vec<String>,
    /// What was found.
    pub findings: Vec<Finding>,
    /// What is said when there is nothing else.
    #[serde(skip)]
    pub(super) otherwise: &'static str,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        !self.findings.iter().any(|finding| finding.level == Level::Problem)
    }

    pub(super) fn add(&mut self, level: Level, subject: &'static str, text: String, advice: String) {
        self.findings.push(Finding { level, subject, text, advice });
    }

    pub(super) fn problem(&mut self, subject: &'static str, text: String, advice: String) {
        self.add(Level::Problem, subject, text, advice);
    }

    pub(super) fn note(&mut self, subject: &'static str, text: String, advice: String) {
        self.add(Level::Note, subject, text, advice);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for watched in &self.toa {
            writeln!(formatter, "{watched}")?;
        }
        for change in &self.changes {
            writeln!(formatter, "{change}")?;
        }
        for finding in &self.findings {
            let level = match finding.level {
                Level::Note => "note",
                Level::Problem => "problem",
            };
            writeln!(formatter, "{level}: {}\n    {}", finding.text, finding.advice)?;
        }
        if self.toa.is_empty() && self.changes.is_empty() && self.is_ok() {
            writeln!(formatter, "{}", self.otherwise)?;
        }
        Ok(())
    }
}

/// Something worth saying.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What it is about, in a word that programs can match.
    pub subject: &'static str,
    /// What is wrong, and why that matters.
    pub text: String,
    /// What to do.
    pub advice: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Good to know.
    Note,
    /// The real server does not serve as it should.
    Problem,
}
