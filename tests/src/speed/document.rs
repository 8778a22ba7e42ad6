//! Tables in the documentation that programs write: between two lines that name them.
//!
//! ```text
//! <!-- bench:peers -->
//! ...
//! <!-- /bench:peers -->
//! ```

use std::fs;

use anyhow::{Context, Result};

/// Where the tables stand.
pub const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/performance.md");

/// Writes a table into the documentation.
pub fn write(name: &str, table: &str) -> Result<()> {
    let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let text = replaced(&text, name, table).with_context(|| format!("{FILE} has no place for the table `{name}`"))?;
    fs::write(FILE, text).with_context(|| format!("write {FILE}"))
}

fn replaced(text: &str, name: &str, table: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- bench:{name} -->\n"), format!("<!-- /bench:{name} -->\n"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{}\n\n{end}{after}", table.trim()))
}

/// The day, as files of committed runs are named after.
pub fn today() -> Result<String> {
    let output = std::process::Command::new("date").args(["--utc", "+%F"]).output().context("ask for the date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_the_last_one() {
        let text = "a\n<!-- bench:b -->\nold\n<!-- /bench:b -->\nc\n";
        let new = replaced(text, "b", "| new |\n");
        assert_eq!(new.as_deref(), Some("a\n<!-- bench:b -->\n\n| new |\n\n<!-- /bench:b -->\nc\n"));
        assert_eq!(replaced(text, "other", "new"), None);
    }
}
