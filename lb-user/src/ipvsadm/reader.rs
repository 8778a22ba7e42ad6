//! Reads a command line the way the library popt does, because scripts depend on its corners.
//!
//! ```text
//! -Ln  -amt ADDR        letters can be glued together, the last may take an argument
//! -w5  -w=5  -w 5       three ways to give a letter its argument
//! --weight=5 --weight 5 two ways to give a word its argument; words cannot be shortened
//! -p  -p 600            an optional argument is the next word, unless that begins with a dash
//! --  -                 the first ends options, the second is a plain word
//! ```
//!
//! The reader gives back one option after the other and keeps the plain words. It knows nothing of what options mean.

use super::{
    complaint::{Complaint, Fault},
    options::{self, Argument, Definition, Found, Switch},
};

/// A switch that was typed.
#[derive(Debug)]
pub(super) struct Occurrence<'a> {
    pub(super) switch: &'static Switch,
    /// The option that it belongs to, if it is no command.
    pub(super) option: Option<&'static Definition>,
    pub(super) argument: Option<&'a str>,
}

/// The reader of a command line.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    words: &'a [String],
    /// Index of the next word.
    next: usize,
    /// What is left of a group of letters.
    group: &'a str,
    plain: Vec<&'a str>,
}

impl<'a> Reader<'a> {
    /// A reader of these words, the program's name not among them.
    pub(super) const fn new(words: &'a [String]) -> Self {
        Self { words, next: 0, group: "", plain: Vec::new() }
    }

    /// The word that was read last: what messages quote.
    pub(super) fn last_word(&self) -> &'a str {
        self.next.checked_sub(1).map_or("", |index| &self.words[index])
    }

    /// The words that are no options. Complete when there is no further option.
    pub(super) fn into_plain(self) -> Vec<&'a str> {
        self.plain
    }

    /// The next option.
    pub(super) fn next(&mut self) -> Option<Result<Occurrence<'a>, Complaint>> {
        while self.group.is_empty() {
            let word = self.next_word()?;
            if word == "--" {
                self.plain.extend(self.words[self.next..].iter().map(String::as_str));
                self.next = self.words.len();
            } else if let Some(long) = word.strip_prefix("--") {
                let (name, argument) = match long.split_once('=') {
                    Some((name, argument)) => (name, Some(argument)),
                    None => (long, None),
                };
                return Some(self.occurrence(options::with_word(name), argument).map(|(occurrence, _)| occurrence));
            } else {
                match word.strip_prefix('-') {
                    Some(letters) if !letters.is_empty() => self.group = letters,
                    _ => self.plain.push(word),
                }
            }
        }
        Some(self.next_letter())
    }

    /// Takes the next letter of the group.
    fn next_letter(&mut self) -> Result<Occurrence<'a>, Complaint> {
        let mut letters = self.group.chars();
        let letter = letters.next();
        let rest = letters.as_str();
        let argument = (!rest.is_empty()).then(|| rest.strip_prefix('=').unwrap_or(rest));
        let found = letter.and_then(options::with_letter);
        // What follows a letter is its argument, or another letter: only the letter itself can say.
        let is_flag = found.is_some_and(|(switch, _)| switch.argument == Argument::No);
        let argument = if is_flag && !rest.starts_with('=') { None } else { argument };
        let (occurrence, used_argument) = self.occurrence(found, argument)?;
        self.group = if used_argument { "" } else { rest };
        Ok(occurrence)
    }

    /// The switch that was found, with the argument attached to it or the next word; and whether the attached one was used.
    fn occurrence(&mut self, found: Option<Found>, attached: Option<&'a str>) -> Result<(Occurrence<'a>, bool), Complaint> {
        let (switch, option) = found.ok_or_else(|| self.fault(Fault::Unknown))?;
        let argument = match (switch.argument, attached) {
            (Argument::No, Some(_)) => return Err(self.fault(Fault::UnwantedArgument)),
            (Argument::No, None) => None,
            (_, Some(argument)) => Some(argument),
            (Argument::Optional, None) => {
                let next = self.words.get(self.next).filter(|word| !word.starts_with('-'));
                next.and_then(|_| self.next_word())
            }
            (Argument::Required, None) => Some(self.next_word().ok_or_else(|| self.fault(Fault::MissingArgument))?),
        };
        Ok((Occurrence { switch, option, argument }, attached.is_some()))
    }

    fn next_word(&mut self) -> Option<&'a str> {
        let word = self.words.get(self.next)?;
        self.next += 1;
        Some(word)
    }

    fn fault(&self, fault: Fault) -> Complaint {
        Complaint::Reader { word: self.last_word().to_owned(), fault }
    }
}
