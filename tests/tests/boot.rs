//! A daemon that a service manager starts: by a socket that it has opened, and with rules from a file.

use std::{
    fs,
    os::unix::{fs::FileTypeExt as _, net::UnixListener},
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs::{Bpfvs, http},
    needs, needs_bpfvs,
    netns::{Namespace, Process},
    wait,
};
use nix::sys::signal::Signal;

/// Turns a command into one that finds a listening socket as the service manager hands it over: as descriptor 3.
fn activated(command: &Command, listener: &UnixListener) -> Result<Command> {
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec env LISTEN_PID=$$ LISTEN_FDS=1 \"$0\" \"$@\" 3>&1 >/dev/null"]);
    shell.arg(command.get_program()).args(command.get_args());
    let descriptor: std::os::fd::OwnedFd = listener.try_clone()?.into();
    shell.stdout(Stdio::from(descriptor)).stderr(Stdio::null());
    Ok(shell)
}

#[test]
fn the_first_who_knocks_starts_the_daemon() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("activated")?;
    let bpfvs = Bpfvs::prepare(&namespace, &[])?;
    let listener = UnixListener::bind(bpfvs.socket())?;
    for round in 1..=2 {
        let socket = bpfvs.socket();
        // It waits at the door before there is a daemon.
        let knocks = thread::spawn(move || http(&socket, "GET", "/v1/services", None));
        // As the service manager does: it looks whether somebody has come, and lets the daemon open.
        let mut daemon = Process::spawn(&mut activated(&bpfvs.serve_command(), &listener)?)?;
        let (status, services) = knocks.join().expect("it does not panic")?;
        ensure!(status == 200 && services.starts_with('['), "round {round}: {status}: {services}");
        if round == 1 {
            bpfvs.ipvsadm("-A -t 192.0.2.1:80 -s rr")?;
            daemon.signal(Signal::SIGTERM)?;
        } else {
            ensure!(services.contains("192.0.2.1"), "the second daemon knows nothing of the first: {services}");
            bpfvs.succeed(&["stop", "--detach"])?;
        }
        let status = daemon.wait(wait::SOON)?;
        ensure!(status.success(), "round {round}: the daemon ended with {status}");
        ensure!(fs::metadata(bpfvs.socket())?.file_type().is_socket(), "round {round}: it took the door away with it");
    }
    ensure!(!bpfvs.pins().exists(), "pins are left");
    Ok(())
}

/// Ends a daemon so that the next one finds nothing, as after a boot.
fn forget_all(bpfvs: &mut Bpfvs) -> Result<()> {
    bpfvs.stop_and_detach()?;
    // It was named, and so it stayed.
    fs::remove_file(bpfvs.state_file()).context("the state file is there")
}

#[test]
fn a_rule_file_is_restored_at_boot_and_saved_at_the_end() -> Result<()> {
    const RULES: &str = "\
-A -t 192.0.2.1:80 -s wrr -p 600
-a -t 192.0.2.1:80 -r 192.0.2.11:80 -g -w 5 -x 2000
-A -u 192.0.2.1:53 -s rr
";
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("rules")?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("ipvsadm.rules");
    let name = file.display().to_string();

    // Before the first save there is no file yet.
    let mut bpfvs = Bpfvs::prepare(&namespace, &["--rules", &name, "--save-rules"])?;
    bpfvs.serve()?;
    ensure!(bpfvs.succeed(&["save"])?.is_empty(), "{}", bpfvs.succeed(&["save"])?);

    // At the end, the file says what is at work, thresholds among it, and after a boot it is there again.
    bpfvs.restore(RULES)?;
    forget_all(&mut bpfvs)?;
    let saved = fs::read_to_string(&file)?;
    ensure!(saved == RULES, "{saved}");
    fs::write(&file, format!("# the web\n\n{saved}"))?;
    bpfvs.serve()?;
    ensure!(bpfvs.succeed(&["save"])? == RULES, "{}", bpfvs.succeed(&["save"])?);

    // At a restart what is at work counts, whatever the file says by then.
    bpfvs.kill9()?;
    fs::write(&file, "-A -t 192.0.2.2:80 -s rr\n")?;
    bpfvs.serve()?;
    ensure!(bpfvs.succeed(&["save"])? == RULES, "a restart has read the file: {}", bpfvs.succeed(&["save"])?);
    forget_all(&mut bpfvs)?;

    // A file that is wrong is no beginning.
    fs::write(&file, "-A -t 192.0.2.1:80 -s rr\n-A -t 192.0.2.1\n")?;
    let output = bpfvs.serve_command().output()?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && complaint.lines().count() == 1, "{output:?}");
    ensure!(complaint.contains(&format!("{name}: line 2")) && complaint.contains("bpfvs restore --check"), "{complaint}");
    ensure!(!bpfvs.pins().exists() && !Path::new(&bpfvs.socket()).exists(), "it has left something");
    Ok(())
}
