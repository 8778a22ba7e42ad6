//! Whole tables from files: `ipvsadm-restore` of large ones, and `bpfvs save` and `bpfvs restore`, which are all or nothing.

use std::{
    fmt::Write as _,
    fs::{self, File},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{bpfvs::Bpfvs, needs, needs_bpfvs, netns::Namespace};

/// A table of so many services with ten real servers each, as `ipvsadm -S` writes it.
fn table(services: u32) -> String {
    let mut text = String::new();
    for service in 0..services {
        let vip = format!("172.16.{}.{}:80", service / 250, service % 250);
        let scheduler = ["rr", "wrr", "wlc", "sh"][service as usize % 4];
        writeln!(text, "-A -t {vip} -s {scheduler}").expect("a string has room");
        for server in 0..10 {
            let address = format!("10.0.{server}.{}", 1 + service % 250);
            writeln!(text, "-a -t {vip} -r {address}:80 -g -w {}", 1 + server % 3).expect("a string has room");
        }
    }
    text
}

/// Restores a table, and says how long it took.
fn restore(bpfvs: &Bpfvs, rules: &str) -> Result<Duration> {
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, rules.as_bytes())?;
    std::io::Seek::rewind(&mut file)?;
    let begin = Instant::now();
    let output = bpfvs.command("ipvsadm-restore").stdin(file).output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(begin.elapsed())
}

#[test]
fn the_time_of_a_restore_grows_with_the_table_and_no_faster() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("large")?;
    let bpfvs = Bpfvs::start(&namespace, &[])?;
    let (small, large) = (table(250), table(2000));
    let short = restore(&bpfvs, &small)?.max(Duration::from_millis(300));
    let long = restore(&bpfvs, &large)?;
    println!("250 services with 10 real servers each: {short:.1?}, 2000: {long:.1?}");
    // Eight times as much; a step that looked at every service for each would make it sixty-four times.
    ensure!(long < short * 24, "{short:.1?} for 250 services, {long:.1?} for 2000");
    let listed = bpfvs.ipvsadm("-Ln")?;
    ensure!(listed.lines().count() == 3 + 2000 * 11, "{} lines", listed.lines().count());
    let saved = bpfvs.ipvsadm("-Sn")?;
    restore(&bpfvs, &saved)?;
    ensure!(bpfvs.ipvsadm("-Sn")? == saved, "a file that was saved restores to another table");
    Ok(())
}

/// What comes in pieces is kept all the same: a daemon that dies after the end of a restore has it.
#[test]
fn a_restore_by_a_pipe_is_safe_at_its_end() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("pipe")?;
    let mut bpfvs = Bpfvs::start(&namespace, &[])?;
    let rules = table(400);
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("rules"), &rules)?;
    let mut cat = Command::new("cat").arg(directory.path().join("rules")).stdout(Stdio::piped()).spawn()?;
    let pipe = cat.stdout.take().context("the pipe was just made")?;
    let output = bpfvs.command("ipvsadm").arg("-R").stdin(pipe).output()?;
    ensure!(output.status.success() && cat.wait()?.success(), "{}", String::from_utf8_lossy(&output.stderr));
    bpfvs.kill9()?;
    bpfvs.serve()?;
    let listed = bpfvs.ipvsadm("-Ln")?;
    ensure!(listed.lines().count() == 3 + 400 * 11, "{} lines are left", listed.lines().count());
    Ok(())
}

const GOOD: &str = "\
# the web
-A -t 192.0.2.1:80 -s wrr -p 600

    # its servers
-a -t 192.0.2.1:80 -r 192.0.2.11 -g -w 5 -x 2000 -y 1000
ipvsadm -a -t 192.0.2.1:80 -r 192.0.2.12:80
--set 0 0 60
";

/// A mistake that a reader of the line sees, two that only the whole table shows, and one of the director's.
const BAD: &str = "\
-A -t 192.0.2.1:80 -s rr
-a -t 192.0.2.1:80 -r 192.0.2.11 -w many
-A -t 192.0.2.1:80 -s rr
";
const CONTRADICTING: &str = "\
# twice
-A -t 192.0.2.1:80 -s rr
-A -t 192.0.2.1:80 -s rr
-a -t 192.0.2.2:80 -r 192.0.2.11
-A -t 192.0.2.3:80 -s quickest
";

#[test]
fn bpfvs_restore_is_all_or_nothing() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("strict")?;
    let bpfvs = Bpfvs::start(&namespace, &[])?;
    let directory = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (good, bad, contradicting) = (file("good", GOOD)?, file("bad", BAD)?, file("contradicting", CONTRADICTING)?);
    bpfvs.ipvsadm("-A -u 192.0.2.9:53 -s rr")?;
    bpfvs.ipvsadm("-A -t 192.0.2.1:80 -s wrr -p 600")?;
    bpfvs.ipvsadm("-a -t 192.0.2.1:80 -r 192.0.2.12:80")?;
    let before = bpfvs.ipvsadm("-Sn")?;

    for check in [&[][..], &["--check"]] {
        for (path, lines) in [(&bad, &[2][..]), (&contradicting, &[3, 4, 5])] {
            let output = bpfvs.output(&[&["restore"], check, &[path]].concat())?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(1), "{path}: {}", output.status);
            for line in lines {
                ensure!(said.contains(&format!("{path}:{line}: ")), "{path}: no line {line} in: {said}");
            }
            ensure!(said.matches(&format!("{path}:")).count() == lines.len(), "{path}: {said}");
            ensure!(said.contains("nothing was changed"), "{said}");
        }
    }
    bpfvs.succeed(&["restore", "--check", &good])?;
    ensure!(bpfvs.ipvsadm("-Sn")? == before, "something was changed");

    bpfvs.succeed(&["restore", &good])?;
    let saved = bpfvs.succeed(&["save"])?;
    let wanted = "\
-A -t 192.0.2.1:80 -s wrr -p 600
-a -t 192.0.2.1:80 -r 192.0.2.11:80 -g -w 5 -x 2000 -y 1000
-a -t 192.0.2.1:80 -r 192.0.2.12:80 -g -w 1
";
    ensure!(saved == wanted, "{saved}");
    ensure!(bpfvs.ipvsadm("-L --timeout")?.ends_with(": 900 120 60\n"), "the timeouts were not restored");
    // What was there already was left alone.
    ensure!(!bpfvs.log().contains("done: RemoveServer"), "{}", bpfvs.log());

    let rules = File::open(file("saved", &saved)?)?;
    bpfvs.ipvsadm("-C")?;
    let output = bpfvs.command("bpfvs").args(["restore", "-"]).stdin(rules).output()?;
    ensure!(output.status.success() && bpfvs.succeed(&["save"])? == saved, "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// To check a file takes no daemon.
#[test]
fn a_check_needs_nobody() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("check")?;
    let bpfvs = Bpfvs::prepare(&namespace, &[])?;
    let file = tempfile::NamedTempFile::new()?;
    for (text, status) in [(GOOD, 0), (BAD, 1), (CONTRADICTING, 1)] {
        fs::write(file.path(), text)?;
        let path = file.path().display().to_string();
        let output = bpfvs.output(&["restore", "--check", &path])?;
        ensure!(output.status.code() == Some(status), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
