//! Rule files: the lines of `ipvsadm -S`, read strictly and written completely.
//!
//! ```text
//! # the web
//! -A -t 192.0.2.1:80 -s wrr -p 600
//! -a -t 192.0.2.1:80 -r 192.0.2.11:80 -g -w 5 -x 2000
//! ```
//!
//! Each line is one change as `ipvsadm` takes it, and ipvsadm's own files are rule files. `ipvsadm -R` does what it can; here
//! every line that cannot be understood is a fault with its number, and lines that change no service are faults, too. Remarks
//! and empty lines may stand anywhere. What is written has the thresholds, which `ipvsadm -S` forgets.

use super::{
    names::Names,
    parse::{self, Action},
    save,
};
use crate::director::model::{Command, ServiceView};

/// A line that says something.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    /// Its number in the file, from 1 on.
    pub line: usize,
    /// What it says.
    pub command: Command,
}

/// A line that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    /// Its number in the file, from 1 on.
    pub line: usize,
    /// What is wrong, and what to do.
    pub text: String,
}

/// Reads a file: all rules, or all faults.
pub fn read(text: &str) -> Result<Vec<Rule>, Vec<Fault>> {
    read_with(text, &Names::of_system())
}

fn read_with(text: &str, names: &Names) -> Result<Vec<Rule>, Vec<Fault>> {
    let (mut rules, mut faults) = (Vec::new(), Vec::new());
    for (line, words) in (1..).zip(text.lines().map(str::trim)) {
        if words.is_empty() || words.starts_with('#') {
            continue;
        }
        match rule(words, names) {
            Ok(command) => rules.push(Rule { line, command }),
            Err(text) => faults.push(Fault { line, text: format!("`{words}` is no rule: {text}") }),
        }
    }
    if faults.is_empty() { Ok(rules) } else { Err(faults) }
}

fn rule(line: &str, names: &Names) -> Result<Command, String> {
    let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    if words.first().is_some_and(|word| word == "ipvsadm") {
        words.remove(0);
    }
    const ADVICE: &str = "rules are what `ipvsadm -S` writes, such as `-A -t 192.0.2.1:80 -s rr`";
    match parse::parse(&words, true, names) {
        Ok(Action::Change(Command::Zero { .. })) => Err(format!("it changes nothing that is kept; {ADVICE}")),
        Ok(Action::Change(command)) => Ok(command),
        Ok(_) => Err(format!("it changes no service; {ADVICE}")),
        Err(complaint) => Err(format!("{}; see `ipvsadm --help`", complaint.text("ipvsadm"))),
    }
}

/// Writes services as a rule file.
pub fn write(services: &[ServiceView]) -> String {
    save::services_with_thresholds(services)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remarks_and_empty_lines_may_stand_anywhere() {
        let text = "# the web\n\n  # more\n-A -t 192.0.2.1:80 -s rr\r\n\tipvsadm -a -t 192.0.2.1:80 -r 192.0.2.11 -g\n";
        let rules = read_with(text, &Names::of_test("")).expect("all is well");
        assert_eq!(rules.iter().map(|rule| rule.line).collect::<Vec<_>>(), [4, 5]);
        assert!(matches!(rules[1].command, Command::AddServer { .. }));
    }

    #[test]
    fn every_fault_has_its_line() {
        let text =
            "-A -t 192.0.2.1:80\n-A\n# fine\n-Z\n-L -n\n-A -t 192.0.2.1:http -s rr # no remark\n-a -t 192.0.2.1:80 -w x\nhello\n";
        let faults = read_with(text, &Names::of_test("")).expect_err("it has faults");
        assert_eq!(faults.iter().map(|fault| fault.line).collect::<Vec<_>>(), [2, 4, 5, 6, 7, 8], "{faults:?}");
        assert!(faults[4].text.contains("illegal weight specified"), "{:?}", faults[4]);
    }
}
