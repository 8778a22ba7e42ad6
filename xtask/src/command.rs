//! Running other programs, in the open: every command is printed before it runs, so that it can be typed by hand.
//!
//! ```text
//! $ sudo apt-get install --yes nginx-light
//! ```
//!
//! What needs root goes through [`as_root`]: as it is for root, with `sudo` for everybody else. Building never does.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::toolchain;

/// Prints a command, runs it and fails if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    announce(command);
    quietly(command)
}

/// Runs a command without printing it and fails if it fails.
pub(crate) fn quietly(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| not_run(command))?;
    if !status.success() {
        bail!("`{}` failed ({status}); its own messages stand above", shown(command));
    }
    Ok(())
}

/// Prints a command, runs it for at most `limit` with its output kept away, and says whether it succeeded.
///
/// For attempts that may well fail, and have something to fall back upon.
pub(crate) fn attempt(command: &mut Command, limit: Duration) -> bool {
    announce(command);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else { return false };
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Ok(None) | Err(_) => {
                // It may have ended just now, and then there is nothing to kill.
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

/// What a command prints on its standard output, if it succeeds.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command to be run as root.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Command::new(program));
    }
    if find("sudo").is_none() {
        bail!(
            "{} needs root, and there is no sudo here to become root; run the same command as root",
            program.as_ref().to_string_lossy()
        );
    }
    let mut command = Command::new("sudo");
    // sudo has a path of its own, which does not lead to rustup's programs.
    command.arg("env").arg(assignment("PATH", &path())).arg(program);
    Ok(command)
}

/// `NAME=value`, as `env` reads it.
pub(crate) fn assignment(name: &str, value: &OsStr) -> OsString {
    let mut assignment = OsString::from(name);
    assignment.push("=");
    assignment.push(value);
    assignment
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository()).env("PATH", path());
    command
}

/// The path to look for programs: the user's, where `cargo install` puts them, and where root's programs are, which is
/// not on every user's path.
pub(crate) fn path() -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&own).collect();
    for more in toolchain::cargo_bin().into_iter().chain(["/usr/sbin".into(), "/sbin".into()]) {
        if !directories.contains(&more) {
            directories.push(more);
        }
    }
    // Only a directory with a colon in its name cannot be joined, and such a one cannot come from a path.
    env::join_paths(directories).unwrap_or(own)
}

/// Where a program is, if it is on the path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&path()).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// The root of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where cargo puts what it builds. This program lies there itself, as `debug/xtask`.
pub(crate) fn target_directory() -> PathBuf {
    let own = env::current_exe().ok();
    own.as_deref().and_then(|own| own.ancestors().nth(2)).map_or_else(|| repository().join("target"), Path::to_owned)
}

/// Prints a sentence about what happens now.
pub(crate) fn say(sentence: &str) {
    eprintln!("{}", paint("1", sentence));
}

/// Prints a command as it would be typed.
pub(crate) fn announce(command: &Command) {
    eprintln!("{}", paint("2", &format!("$ {}", shown(command))));
}

/// A command as it would be typed.
pub(crate) fn shown(command: &Command) -> String {
    let mut text = String::new();
    // Of the environment only what is added for this command: the path is the same for all.
    for (name, value) in command.get_envs().filter(|(name, _)| *name != "PATH") {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = write!(text, "{}={} ", name.to_string_lossy(), quoted(&value.to_string_lossy()));
        }
    }
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(|word| quoted(&word.to_string_lossy()));
    text + &words.collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:=,+@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Puts text between terminal codes, if somebody looks.
fn paint(code: &str, text: &str) -> String {
    if io::stderr().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn not_run(command: &Command) -> String {
    format!("`{}` cannot be run; is it installed?", shown(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo it's 1", "a-b_c/d.e"]).env("NAME", "two words").env("PATH", "/bin");
        assert_eq!(shown(&command), r"NAME='two words' sh -c 'echo it'\''s 1' a-b_c/d.e");
    }

    #[test]
    fn an_attempt_ends_at_its_limit() {
        let begin = Instant::now();
        assert!(!attempt(Command::new("sleep").arg("60"), Duration::from_millis(50)));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn an_attempt_reports_success_and_failure() {
        assert!(attempt(&mut Command::new("true"), Duration::from_secs(10)));
        assert!(!attempt(&mut Command::new("false"), Duration::from_secs(10)));
        assert!(!attempt(&mut Command::new("/nonexistent"), Duration::from_secs(10)));
    }
}
