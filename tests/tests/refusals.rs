//! Bad situations: each gives one clear sentence and a status that is not zero, and changes nothing.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bpfvs::Bpfvs,
    lab::{Family, Layout},
    needs, needs_bpfvs,
    netns::Namespace,
    programs::url,
};
use nix::sys::signal::Signal;

/// Checks that a command has failed with one sentence that has all these parts, and returns the sentence.
fn one_sentence(output: &Output, parts: &[&str]) -> Result<String> {
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(!output.status.success(), "it succeeded: {}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.code().is_some(), "a signal ended it: {}", output.status);
    ensure!(!complaint.is_empty() && complaint.lines().count() == 1, "this is not one line: {complaint:?}");
    for part in parts {
        ensure!(complaint.contains(part), "there is no {part:?} in: {complaint}");
    }
    for never in ["panicked", "os error", "Errno", "E2BIG", "EINVAL", "EPERM", "Os {"] {
        ensure!(!complaint.contains(never), "{never:?} is nothing to tell people: {complaint}");
    }
    Ok(complaint)
}

/// What a daemon has: rules, attached programs, pins.
fn everything(bpfvs: &Bpfvs, namespace: &Namespace) -> Result<String> {
    let pins = fs::read_dir(bpfvs.pins().join("maps"))?.flatten().count();
    let interfaces = bpfvs.get("/v1/status")?["interfaces"].clone();
    Ok(format!("{}\n{interfaces}\n{pins}\n{}", bpfvs.ipvsadm("-Sn")?, namespace.run("ip", ["-o", "link"])?))
}

fn run(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().context("start bpfvs")
}

#[test]
fn a_second_daemon_in_the_same_namespace() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("twice")?;
    let first = Bpfvs::start(&namespace, &[])?;
    first.ipvsadm("-A -t 192.0.2.1:80 -s rr")?;
    let before = everything(&first, &namespace)?;
    // The second has another socket and another state file: it is the namespace that has an owner.
    let mut second = Command::new(bpfvs_tests::bpfvs::binary()?);
    let directory = tempfile::tempdir()?;
    second.args(["serve", "--netns"]).arg(namespace.path());
    second.arg("--socket").arg(directory.path().join("socket")).arg("--state").arg(directory.path().join("state"));
    let first_pid = first.pid()?.to_string();
    one_sentence(&run(&mut second)?, &["namespace", &first_pid])?;
    ensure!(everything(&first, &namespace)? == before, "the second daemon changed something");
    ensure!(!directory.path().join("state").exists(), "the second daemon wrote a state file");
    Ok(())
}

#[test]
fn a_damaged_state_file() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    for damage in ["", "{", "{\"services\": 7}", "\u{0}\u{1}\u{2}"] {
        let namespace = Namespace::new("damaged")?;
        let bpfvs = Bpfvs::prepare(&namespace, &[])?;
        fs::write(bpfvs.state_file(), damage)?;
        let path = bpfvs.state_file().display().to_string();
        one_sentence(&run(&mut bpfvs.serve_command())?, &[&path])?;
        ensure!(fs::read_to_string(bpfvs.state_file())? == damage, "the damaged file was changed");
        ensure!(!bpfvs.pins().exists(), "something was pinned");
        ensure!(!bpfvs.socket().exists(), "a socket was left");
    }
    Ok(())
}

#[test]
fn a_missing_capability() -> Result<()> {
    needs!(root, "setpriv");
    needs_bpfvs!();
    let namespace = Namespace::new("poor")?;
    let bpfvs = Bpfvs::prepare(&namespace, &[])?;
    let serve = bpfvs.serve_command();
    let mut command = Command::new("setpriv");
    command
        .args(["--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-bpf,-sys_admin"])
        .arg(serve.get_program())
        .args(serve.get_args());
    one_sentence(&run(&mut command)?, &["CAP_", "root"])?;
    ensure!(!bpfvs.pins().exists(), "something was pinned");
    Ok(())
}

#[test]
fn wrong_options() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("wrong")?;
    let bpfvs = Bpfvs::start(&namespace, &[])?;
    let before = everything(&bpfvs, &namespace)?;
    for (arguments, part) in [
        (&["serve", "--hook", "tcp"][..], "tcp"),
        (&["serve", "--netns", "bpfvst-there-is-none"], "bpfvst-there-is-none"),
        (&["attach", "eth77"], "eth77"),
        (&["service", "add", "tcp://192.0.2.1:99999"], "99999"),
        (&["service", "add", "tcp://192.0.2.1:80", "--scheduler", "quickest"], "quickest"),
        (&["server", "add", "tcp://192.0.2.1:80", "192.0.2.300"], "192.0.2.300"),
        (&["server", "add", "tcp://192.0.2.1:80", "192.0.2.30"], "192.0.2.1"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let output = bpfvs.output(arguments)?;
        ensure!(!output.status.success(), "{arguments:?} succeeded");
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(complaint.contains(part), "{arguments:?}: no {part:?} in: {complaint}");
        ensure!(!complaint.contains("panicked"), "{arguments:?}: {complaint}");
    }
    ensure!(everything(&bpfvs, &namespace)? == before, "something was changed");
    Ok(())
}

#[test]
fn what_this_version_cannot_do_yet() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("later")?;
    let bpfvs = Bpfvs::start(&namespace, &[])?;
    bpfvs.ipvsadm("-A -t 192.0.2.1:80 -s rr")?;
    let before = bpfvs.ipvsadm("-Sn")?;
    let line = "-a -t 192.0.2.1:80 -r 192.0.2.30:80 -m --fullnat";
    let output = run(bpfvs.command("ipvsadm").args(line.split(' ')))?;
    one_sentence(&output, &["local IPv4 address"]).with_context(|| format!("ipvsadm {line}"))?;
    ensure!(bpfvs.ipvsadm("-Sn")? == before, "something was changed");
    Ok(())
}

#[test]
fn no_daemon_to_talk_to() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("nobody")?;
    let bpfvs = Bpfvs::prepare(&namespace, &[])?;
    let socket = bpfvs.socket().display().to_string();
    one_sentence(&run(bpfvs.command("bpfvs").arg("status"))?, &[&socket, "bpfvs serve"])?;
    let output = run(bpfvs.command("ipvsadm").arg("-Ln"))?;
    ensure!(!output.status.success(), "ipvsadm succeeded without a daemon");
    Ok(())
}

/// Not a command that is refused, but a request: the client is told at once instead of waiting.
#[test]
fn a_service_without_usable_servers() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 1, &[])?;
    balanced.service("rr", &["-g -w 0"])?;
    for family in Family::ALL {
        let before = balanced.bpfvs.reason("no-server")?;
        let address = url(balanced.lab.vip.of(family), "");
        let begin = std::time::Instant::now();
        let output = run(balanced.lab.client.command("curl").args(["--silent", "--show-error", "--max-time", "10", &address]))?;
        // 7: could not connect; 28 would be the time that ran out.
        ensure!(output.status.code() == Some(7), "{family:?}: curl ended with {}", output.status);
        ensure!(begin.elapsed().as_secs() < 5, "{family:?}: the client waited {:?}", begin.elapsed());
        ensure!(balanced.bpfvs.reason("no-server")? > before, "{family:?}: the reason was not counted");
    }
    Ok(())
}

/// A daemon that is told to end by a signal ends well.
#[test]
fn sigterm_is_a_polite_stop() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("term")?;
    let mut bpfvs = Bpfvs::start(&namespace, &[])?;
    bpfvs.ipvsadm("-A -t 192.0.2.1:80 -s rr")?;
    let saved = bpfvs.ipvsadm("-Sn")?;
    let status = bpfvs.end_by(Signal::SIGTERM)?;
    ensure!(status.success(), "it ended with {status}");
    bpfvs.serve()?;
    ensure!(bpfvs.ipvsadm("-Sn")? == saved, "the rules are others");
    Ok(())
}
