//! `toa`: programs behind FULLNAT see their clients, though packets come from the director.
//!
//! The director names the client in a TCP option ([`lb_common::toa`]). Three programs in the kernel read it and answer
//! `accept` and `getpeername` with it, for every process of a control group, and without their help:
//!
//! ```text
//! bpfvs realserver toa on --from 10.0.0.204
//! bpfvs realserver toa status
//! bpfvs realserver toa off
//! ```
//!
//! Links and maps are pinned, in one directory for each control group, named by its number. What is pinned is all the memory there
//! is: nothing has to be put back.

use std::{
    fmt,
    fs::{self, Permissions},
    net::{IpAddr, Ipv6Addr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{
        Map, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{
        CgroupAttachMode, CgroupSockAddr, SockOps,
        links::{FdLink, PinnedLink},
    },
    util::KernelVersion,
};
use clap::Subcommand;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::{
    family::{self, Ipv6},
    toa::Outcome,
};
use serde::Serialize;

use super::{
    control_group::{self, ControlGroup},
    instance::{self, Instance, remove_pins},
    report::Report,
    state,
};
use crate::bpf_file_system;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/toa"));

/// The map of trusted networks, as the programs name it.
const TRUSTED: &str = "TRUSTED";
/// The map of the counters, as the programs name it.
const OUTCOMES: &str = "OUTCOMES";
/// The programs that answer. They are attached before the one that reads options, which gives them something to say.
const PEERS: [&str; 2] = ["toa_peer4", "toa_peer6"];
/// The program that reads options.
const SEGMENTS: &str = "toa_segments";

/// What `toa` is told.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Begins; for a control group that has it already, only the trusted addresses change.
    ///
    /// New connections count, also those of programs that run already. It stays until `off` or reboot.
    On(On),
    /// Ends: programs see the addresses of the packets again.
    Off(Off),
    /// Shows where it is on, and what came of the options. Exit code 1 if it is on nowhere.
    Status,
}

#[derive(Clone, Debug, clap::Args)]
struct On {
    /// Believes options only from this address or network, which should be the director's local addresses; may be repeated.
    /// Without it, options of every sender are believed, so a client that reaches this server directly can lie about its address.
    #[arg(long, value_name = "ADDRESS|CIDR")]
    from: Vec<Trusted>,
    #[command(flatten)]
    place: Place,
}

#[derive(Clone, Debug, clap::Args)]
struct Off {
    #[command(flatten)]
    place: Place,
}

/// Whose programs are meant.
#[derive(Clone, Debug, clap::Args)]
struct Place {
    /// Only processes of this control group (version 2), a directory; without it `on` is for all processes, and `off` for every
    /// control group.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

impl Args {
    pub(super) const fn json(&self) -> bool {
        self.json
    }
}

/// An address or a network on the command line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Trusted(IpNet);

impl FromStr for Trusted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>());
        let network =
            network.map_err(|_| "it is neither an address nor a network; write 10.0.0.204, 10.0.0.0/24 or fd00::/64".to_owned())?;
        Ok(Self(network.trunc()))
    }
}

impl Trusted {
    /// Every sender, of both families.
    const EVERYBODY: Self = Self(IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)));

    /// As the programs look it up: IPv4 in the form of IPv6.
    fn key(self) -> Key<Ipv6> {
        let (address, length) = match self.0 {
            IpNet::V4(network) => (network.network().to_ipv6_mapped(), 96 + network.prefix_len()),
            IpNet::V6(network) => (network.network(), network.prefix_len()),
        };
        Key::new(length.into(), family::ipv6(address))
    }

    fn from_key(key: &Key<Ipv6>) -> Option<Self> {
        let length = u8::try_from(key.prefix_len()).ok()?;
        let [a, b, c, d] = key.data().map(|word| u128::from(u32::from_be(word)));
        let address = Ipv6Addr::from_bits(a << 96 | b << 64 | c << 32 | d);
        let network = match address.to_ipv4_mapped() {
            Some(address) if length >= 96 => Ipv4Net::new(address, length - 96).ok()?.into(),
            _ => Ipv6Net::new(address, length).ok()?.into(),
        };
        Some(Self(network))
    }
}

impl fmt::Display for Trusted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::EVERYBODY {
            write!(formatter, "everybody")
        } else if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(formatter, "{}", self.0.addr())
        } else {
            write!(formatter, "{}", self.0)
        }
    }
}

/// A control group whose processes see their clients.
#[derive(Clone, Debug, Serialize)]
pub struct Watched {
    /// Its directory; nothing if it does not exist any more.
    pub cgroup: Option<PathBuf>,
    /// Whose options are believed: addresses, networks, or `everybody`.
    pub trusted: Vec<String>,
    /// Connections whose clients are shown.
    pub shown: u64,
    /// Options that came from somebody who is not trusted.
    pub untrusted: u64,
    /// How often a program asked an IPv4 socket for a client that has IPv6, and was told the director's address.
    pub unshowable: u64,
}

impl fmt::Display for Watched {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cgroup {
            Some(cgroup) => write!(formatter, "on for {}", cgroup.display())?,
            None => write!(formatter, "on for a control group that does not exist any more (`off` removes it)")?,
        }
        write!(
            formatter,
            ", options are believed from {}\n    connections whose clients are shown: {}; options not believed: {}; \
             IPv6 clients that an IPv4 socket could not show: {}",
            self.trusted.join(", "),
            self.shown,
            self.untrusted,
            self.unshowable
        )
    }
}

/// Runs the command and returns what it has to say.
pub(super) fn run(args: &Args) -> Result<Report> {
    let _lock = state::lock(&Instance::enter(None)?)?;
    match &args.command {
        Command::On(on) => switch_on(on),
        Command::Off(off) => switch_off(off),
        Command::Status => status(),
    }
}

fn switch_on(args: &On) -> Result<Report> {
    let old = KernelVersion::current().ok().filter(|kernel| *kernel < KernelVersion::new(5, 10, 0));
    if let Some(kernel) = old {
        bail!(
            "cannot show clients' addresses: this kernel is {kernel}, and programs may look at TCP options from 5.10 on; use a newer one"
        );
    }
    let group = ControlGroup::open(args.place.cgroup.as_deref())?;
    let trusted = if args.from.is_empty() { vec![Trusted::EVERYBODY] } else { args.from.clone() };
    let mut report = Report { otherwise: "already on: nothing to change", ..Report::default() };
    let pins = pins(group.id);
    if is_whole(&pins) {
        if believe(open_trusted(&pins)?, &trusted)? {
            report.changes.push(format!("options are now believed from {} in {}", list(&trusted), group.path.display()));
        }
    } else {
        remove_pins(&pins)?;
        if let Err(error) = attach(&group, &pins, &trusted) {
            // The first error is the one to tell; half-made pins are no harm, because the next `on` removes them.
            let _ = remove_pins(&pins);
            return Err(error);
        }
        report.changes.push(format!(
            "processes of {} now see the clients of new connections, whose options are believed from {}",
            group.path.display(),
            list(&trusted)
        ));
    }
    if args.from.is_empty() {
        report.note(
            "trust",
            "Every sender is believed: a client that reaches this server without the director can claim any address.".to_owned(),
            "name the director's local addresses: bpfvs realserver toa on --from ADDRESS".to_owned(),
        );
    }
    Ok(report)
}

fn switch_off(args: &Off) -> Result<Report> {
    let mut report = Report { otherwise: "not on: nothing to take back", ..Report::default() };
    let ids = match &args.place.cgroup {
        Some(path) => vec![ControlGroup::open(Some(path))?.id],
        None => watched()?,
    };
    for id in ids {
        let pins = pins(id);
        if pins.exists() {
            remove_pins(&pins)?;
            let place = control_group::path_of(id).map_or("a control group that is gone".into(), |path| path.display().to_string());
            report.changes.push(format!("processes of {place} see the addresses of the packets again"));
        }
    }
    Ok(report)
}

fn status() -> Result<Report> {
    let mut report = Report::default();
    for id in watched()? {
        let pins = pins(id);
        let mut trusted: Vec<String> = Vec::new();
        for key in open_trusted(&pins)?.keys() {
            let key = key.with_context(|| unreadable(&pins))?;
            trusted.extend(Trusted::from_key(&key).map(|trusted| trusted.to_string()));
        }
        let outcomes =
            PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(open(&pins, OUTCOMES)?)).with_context(|| unreadable(&pins))?;
        let count = |outcome: Outcome| -> Result<u64> {
            Ok(outcomes.get(&(outcome as u32), 0).with_context(|| unreadable(&pins))?.iter().sum())
        };
        report.toa.push(Watched {
            cgroup: control_group::path_of(id),
            trusted,
            shown: count(Outcome::Taken)?,
            untrusted: count(Outcome::Untrusted)?,
            unshowable: count(Outcome::Unshowable)?,
        });
    }
    if report.toa.is_empty() {
        report.problem(
            "off",
            "It is off: programs on this machine see the addresses of the packets, which behind FULLNAT are the director's."
                .to_owned(),
            "bpfvs realserver toa on --from ADDRESS, with the director's local addresses".to_owned(),
        );
    }
    Ok(report)
}

/// Loads the programs, attaches them, and pins what keeps them there.
fn attach(group: &ControlGroup, pins: &Path, trusted: &[Trusted]) -> Result<()> {
    bpf_file_system::ensure().context("cannot pin the programs")?;
    let pinning = || format!("cannot pin the programs in {}: the kernel refused; run as root", pins.display());
    fs::create_dir_all(pins).with_context(pinning)?;
    fs::set_permissions(pins, Permissions::from_mode(0o700)).with_context(pinning)?;
    let mut ebpf = EbpfLoader::new()
        .map_pin_path(TRUSTED, pins.join(TRUSTED))
        .map_pin_path(OUTCOMES, pins.join(OUTCOMES))
        .load(OBJECT)
        .context("cannot load the programs that show clients' addresses: the kernel refused their maps; run as root on Linux 6.1 or newer")?;
    believe(open_trusted(pins)?, trusted)?;
    let loading = || "cannot load the programs that show clients' addresses: the kernel refused; run as root on Linux 6.1 or newer";
    let attaching = || {
        format!(
            "cannot attach the programs that show clients' addresses to {}: the kernel refused; see `bpftool cgroup tree`, and run as root",
            group.path.display()
        )
    };
    // No flags: a link lets others be attached besides, and does not take the word for it.
    let mode = CgroupAttachMode::Single;
    for name in PEERS {
        let program: &mut CgroupSockAddr = find(&mut ebpf, name)?.try_into().with_context(loading)?;
        program.load().with_context(loading)?;
        let link = program.attach(&group.file, mode).with_context(attaching)?;
        let link: FdLink = program.take_link(link)?.try_into().with_context(attaching)?;
        link.pin(pins.join(name)).with_context(pinning)?;
    }
    let program: &mut SockOps = find(&mut ebpf, SEGMENTS)?.try_into().with_context(loading)?;
    program.load().with_context(loading)?;
    let link = program.attach(&group.file, mode).with_context(attaching)?;
    let link: FdLink = program.take_link(link)?.try_into().with_context(attaching)?;
    link.pin(pins.join(SEGMENTS)).with_context(pinning)?;
    Ok(())
}

fn find<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name).ok_or_else(|| anyhow!("cannot find the program {name} in bpfvs: it was built wrongly; build it anew"))
}

/// Makes the programs believe exactly these senders; says whether they believed others before.
fn believe(mut map: LpmTrie<MapData, Ipv6, u8>, trusted: &[Trusted]) -> Result<bool> {
    let failed = || "cannot tell the programs whom to believe: the kernel refused; run as root, with at most 1024 addresses";
    let wanted: Vec<Key<Ipv6>> = trusted.iter().map(|trusted| trusted.key()).collect();
    let same = |left: &Key<Ipv6>, right: &Key<Ipv6>| (left.prefix_len(), left.data()) == (right.prefix_len(), right.data());
    let present: Vec<Key<Ipv6>> = map.keys().collect::<Result<_, _>>().with_context(failed)?;
    let mut changed = false;
    // First those who are new, so that a director that stays is believed all the time.
    for key in wanted.iter().filter(|key| !present.iter().any(|known| same(known, key))) {
        map.insert(key, 1, 0).with_context(failed)?;
        changed = true;
    }
    for key in present.iter().filter(|key| !wanted.iter().any(|wanted| same(wanted, key))) {
        map.remove(key).with_context(failed)?;
        changed = true;
    }
    Ok(changed)
}

fn list(trusted: &[Trusted]) -> String {
    trusted.iter().map(Trusted::to_string).collect::<Vec<_>>().join(", ")
}

fn pins(id: u64) -> PathBuf {
    instance::control_group_pins().join(id.to_string())
}

/// The numbers of the control groups where it is on.
fn watched() -> Result<Vec<u64>> {
    let directory = instance::control_group_pins();
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let entries =
        fs::read_dir(&directory).with_context(|| format!("cannot list {}: see the cause; run as root", directory.display()))?;
    let mut ids: Vec<u64> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Whether everything is there: a command may have been interrupted.
fn is_whole(pins: &Path) -> bool {
    PEERS.into_iter().chain([SEGMENTS]).all(|name| PinnedLink::from_pin(pins.join(name)).is_ok())
}

fn open(pins: &Path, map: &str) -> Result<MapData> {
    MapData::from_pin(pins.join(map)).with_context(|| unreadable(pins))
}

fn open_trusted(pins: &Path) -> Result<LpmTrie<MapData, Ipv6, u8>> {
    LpmTrie::try_from(Map::LpmTrie(open(pins, TRUSTED)?)).with_context(|| unreadable(pins))
}

fn unreadable(pins: &Path) -> String {
    format!("cannot read what is pinned in {}: see the cause; run as root, or switch it off and on again", pins.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_are_addresses_or_networks_of_both_families() {
        for (text, shown, length) in [
            ("10.0.0.204", "10.0.0.204", 128),
            ("10.0.0.204/24", "10.0.0.0/24", 120),
            ("0.0.0.0/0", "0.0.0.0/0", 96),
            ("fd00::1/64", "fd00::/64", 64),
            ("::/0", "everybody", 0),
        ] {
            let trusted: Trusted = text.parse().expect("an address or a network");
            assert_eq!(trusted.to_string(), shown);
            assert_eq!(trusted.key().prefix_len(), length);
            assert_eq!(Trusted::from_key(&trusted.key()), Some(trusted));
        }
        assert!("10.0.0.0/33".parse::<Trusted>().is_err());
        assert!("director".parse::<Trusted>().is_err());
    }
}
