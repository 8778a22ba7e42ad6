//! The Debian package: installed, used and purged, in a root of its own that is laid over this machine's; its manual pages and
//! completions.
//!
//! `BPFVS_DEB` names the package; `cargo xtask deb --debug` makes it, and `cargo xtask test` does both.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{bpfvs::binary, needs, needs_bpfvs, netns::Namespace, skip};

/// A root of its own: what is written there goes with the mount namespace, which ends with the script.
const ROOT: &str = r#"
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for directory in proc sys dev; do mount --rbind "/$directory" "$1/root/$directory"; done
mount -t tmpfs tmpfs "$1/root/run"
mount -t tmpfs tmpfs "$1/root/tmp"
cp "$2" "$1/root/tmp/bpfvs.deb"
exec chroot "$1/root" /bin/sh -euxc "$3"
"#;

/// What is done there.
const LIFE: &str = r#"
export DEBIAN_FRONTEND=noninteractive
# It takes seconds, and nobody will look anything up.
printf '#!/bin/sh\n' >/usr/bin/mandb
if dpkg-query --show ipvsadm; then dpkg --purge --force-depends ipvsadm; fi
rm -f /usr/sbin/ipvsadm /usr/sbin/ipvsadm-save /usr/sbin/ipvsadm-restore

dpkg --install /tmp/bpfvs.deb
for name in ipvsadm ipvsadm-save ipvsadm-restore; do
    test "$(readlink -f /usr/sbin/$name)" = /usr/sbin/bpfvs
    test -s "$(readlink -f /usr/share/man/man8/$name.8.gz)"
done
test -s /usr/share/man/man8/bpfvs-service-add.8.gz
test -d /run/bpfvs
if command -v systemd-analyze; then
    units=/usr/lib/systemd/system
    test -z "$(systemd-analyze verify --man=no $units/bpfvs.service $units/bpfvs.socket 2>&1 | grep bpfvs)"
fi

. /etc/default/bpfvs
bpfvs serve --interface lo $BPFVS_OPTIONS >/tmp/ready 2>/tmp/log &
trap 'kill $! && bpfvs stop --detach' EXIT
for try in $(seq 300); do grep -q ready /tmp/ready && break; kill -0 $! || { cat /tmp/log; exit 1; }; sleep 0.1; done
pins=$(bpfvs status | sed -n 's/^pins  *//p')
test -d "$pins"
ipvsadm -A -t 192.0.2.1:80 -s wrr
ipvsadm-save -n >/tmp/rules
grep -qxe '-A -t 192.0.2.1:80 -s wrr' /tmp/rules
ipvsadm-restore </tmp/rules

dpkg --purge bpfvs
wait $!
trap - EXIT
test ! -e "$pins"
for path in /usr/sbin/ipvsadm /usr/sbin/ipvsadm-save /usr/sbin/bpfvs /usr/share/man/man8/ipvsadm.8.gz /etc/default/bpfvs \
    /usr/share/bpfvs /run/bpfvs /var/lib/bpfvs; do
    test ! -e $path
    test ! -L $path
done

# A name that belongs to somebody else stays with him.
printf '#!/bin/sh\necho original\n' >/usr/sbin/ipvsadm
chmod 755 /usr/sbin/ipvsadm
dpkg --install /tmp/bpfvs.deb 2>&1 | grep "is another package's"
test "$(ipvsadm)" = original
dpkg --purge bpfvs
test "$(ipvsadm)" = original
echo the end
"#;

#[test]
fn the_package_is_installed_used_and_purged() -> Result<()> {
    needs!(root, "dpkg", "update-alternatives", "unshare", "chroot");
    let Some(package) = env::var_os("BPFVS_DEB").map(PathBuf::from) else {
        skip!("BPFVS_DEB names no package; `cargo xtask deb --debug` makes one");
    };
    ensure!(package.is_file(), "BPFVS_DEB names {}, which is no file", package.display());
    let namespace = Namespace::new("package")?;
    let place = tempfile::tempdir()?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.path().display()));
    command.args(["unshare", "--mount", "sh", "-c", ROOT, "root"]).arg(place.path()).arg(&package).arg(LIFE);
    let output = command.env_remove("BPFVS_SOCKET").stdin(Stdio::null()).output().context("start unshare")?;
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success() && output.stdout.ends_with(b"the end\n"),
        "{}:\n{}\n{}",
        output.status,
        said(&output.stdout),
        said(&output.stderr)
    );
    Ok(())
}

/// The subcommands that a command's help names.
fn subcommands(words: &[&str]) -> Result<Vec<String>> {
    let output = Command::new(binary()?).args(words).arg("--help").output().context("start bpfvs")?;
    ensure!(output.status.success(), "bpfvs {} --help: {}", words.join(" "), output.status);
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| line.starts_with("  "));
    let names = names.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| *name != "help").map(str::to_owned).collect())
}

#[test]
fn each_command_has_a_page_that_can_be_read() -> Result<()> {
    needs!(root, "groff");
    needs_bpfvs!();
    let directory = tempfile::tempdir()?;
    let made = Command::new(binary()?).arg("man").arg(directory.path()).status().context("start bpfvs")?;
    ensure!(made.success(), "bpfvs man: {made}");
    let page = |name: &str| directory.path().join(format!("{name}.8"));
    let mut pages = vec!["bpfvs".to_owned(), "ipvsadm".to_owned(), "ipvsadm-save".to_owned(), "ipvsadm-restore".to_owned()];
    let commands = subcommands(&[])?;
    ensure!(commands.len() > 15, "{commands:?}");
    for command in commands {
        if command != "ipvsadm" {
            pages.extend(subcommands(&[&command])?.iter().map(|part| format!("bpfvs-{command}-{part}")));
        }
        pages.push(format!("bpfvs-{command}"));
    }
    for name in &pages {
        ensure!(page(name).is_file(), "there is no page {name}(8)");
    }
    for entry in fs::read_dir(directory.path())? {
        let path = entry?.path();
        let output = Command::new("groff").args(["-man", "-ww", "-Tutf8"]).arg(&path).output().context("start groff")?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() && complaint.is_empty(), "{}: {complaint}", path.display());
        ensure!(output.stdout.len() > 200, "{} is empty", path.display());
    }
    Ok(())
}

#[test]
fn completions_are_what_the_shell_reads() -> Result<()> {
    needs_bpfvs!();
    let file = tempfile::NamedTempFile::new()?;
    let path: &Path = file.path();
    for (shell, arguments) in [("bash", ["-n"].as_slice()), ("fish", &["--no-execute"]), ("zsh", &["-n"])] {
        let output = Command::new(binary()?).args(["completions", shell]).output().context("start bpfvs")?;
        ensure!(output.status.success() && output.stdout.len() > 1000, "{shell}: {}", output.status);
        // Whoever has no such shell needs no completions for it.
        if skip::find(shell).is_some() {
            fs::write(path, &output.stdout)?;
            let status = Command::new(shell).args(arguments).arg(path).status().with_context(|| format!("start {shell}"))?;
            ensure!(status.success(), "{shell} cannot read its completions: {status}");
        }
    }
    Ok(())
}
