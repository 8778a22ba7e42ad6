//! `bpfvs serve --rules`: the rule file that a daemon begins with.
//!
//! | `--rules` | read at a fresh start | written at the end |
//! | --- | --- | --- |
//! | a file | that, if it is there | with `--save-rules` |
//! | `auto` on Debian | `/etc/ipvsadm.rules`, if `/etc/default/ipvsadm` says `AUTO="true"` | likewise |
//! | `auto` on Red Hat | `/etc/sysconfig/ipvsadm`, if it is there | likewise |
//!
//! A daemon that takes over what another one has left reads no rules: it has them, and connections besides.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::{daemon::serve::Rules, ipvsadm::rules};

/// In the place of a file: that of the distribution.
const AUTO: &str = "auto";

/// Finds the rules and reads them.
pub(super) fn find(file: &Path, save: bool) -> anyhow::Result<Option<Rules>> {
    if file == Path::new(AUTO) {
        return of_distribution(Path::new("/etc")).map(|file| read(file, true)).transpose();
    }
    read(file.to_owned(), save).map(Some)
}

/// Where ipvsadm's own package would keep the rules, if it were to restore them at boot.
fn of_distribution(etc: &Path) -> Option<PathBuf> {
    let debian = fs::read_to_string(etc.join("default/ipvsadm")).unwrap_or_default();
    // A file of shell assignments, of which the last one counts.
    let auto = debian.lines().filter_map(|line| line.trim().strip_prefix("AUTO=")).next_back();
    let is_wanted = auto.is_some_and(|value| value.trim_matches(['"', '\'', ' ', '\t']) == "true");
    let red_hat = etc.join("sysconfig/ipvsadm");
    if is_wanted { Some(etc.join("ipvsadm.rules")) } else { Some(red_hat).filter(|file| file.is_file()) }
}

fn read(file: PathBuf, save: bool) -> anyhow::Result<Rules> {
    let text = match fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.with_context(|| format!("cannot read the rules in {}; see that it is a text file", file.display()))?,
    };
    let commands = match rules::read(&text) {
        Ok(rules) => rules.into_iter().map(|rule| rule.command).collect(),
        Err(faults) => {
            let first = faults.first().map_or_else(String::new, |fault| format!("line {}: {}", fault.line, fault.text));
            let file = file.display();
            bail!("cannot begin with the rules in {file}: {first}; `bpfvs restore --check {file}` tells all that is wrong")
        }
    };
    Ok(Rules { file, commands, save: save.then_some(rules::write) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distributions_place_is_found() {
        let etc = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            let path = etc.path().join(name);
            fs::create_dir_all(path.parent().expect("it has one")).expect("it can be made");
            fs::write(path, text).expect("it can be written");
        };
        assert_eq!(of_distribution(etc.path()), None);
        for (text, wanted) in [
            ("AUTO=\"false\"\n", false),
            ("# AUTO=\"true\"\n", false),
            ("AUTO=\"true\"\n", true),
            ("AUTO=true\nAUTO=false\n", false),
            ("AUTO='true' \nDAEMON=none\n", true),
        ] {
            write("default/ipvsadm", text);
            assert_eq!(of_distribution(etc.path()), wanted.then(|| etc.path().join("ipvsadm.rules")), "{text}");
        }
        fs::remove_file(etc.path().join("default/ipvsadm")).expect("it is there");
        write("sysconfig/ipvsadm", "");
        assert_eq!(of_distribution(etc.path()), Some(etc.path().join("sysconfig/ipvsadm")));
    }

    #[test]
    fn a_wrong_line_is_an_error_and_a_missing_file_is_none() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("rules");
        assert!(read(file.clone(), true).expect("there is none").commands.is_empty());
        fs::write(&file, "-A -t 192.0.2.1:80 -s rr\n-A -t nonsense\n").expect("it can be written");
        let error = read(file, true).expect_err("it is wrong").to_string();
        assert!(error.contains("line 2") && error.contains("restore --check"), "{error}");
    }
}
