//! Our decapsulation program in the kernel: attaching it so that it stays, telling it the addresses, asking it for its counts.
//!
//! Program, maps and link are pinned in one directory for each interface; the pinned link keeps the program attached
//! after this process has ended. Where the kernel has no links for tc (before 6.6), the filter stays by itself, and its
//! priority and handle are remembered.

use std::{
    fs::{self, Permissions},
    mem,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
};

use anyhow::{Context, Result, anyhow};
use aya::{
    EbpfLoader, include_bytes_aligned,
    maps::{HashMap, Map, MapData, PerCpuArray},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, Link},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
    },
    util::KernelVersion,
};
use lb_common::{
    family::Ipv6,
    packet::tunnel::{self, Accepts, Kind, Outcome},
};

use crate::bpf_file_system;

use super::{
    Hook, TunnelType,
    instance::remove_pins,
    network::Network,
    state::{Arrival, Attachment, Vip},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/decap"));

/// The map of the addresses, as the program names it.
const VIPS: &str = "VIPS";
/// The map of the counters, as the program names it.
const OUTCOMES: &str = "OUTCOMES";

/// The hook that is used when this one is asked for: kernels before 6.6 have tc only with a qdisc.
pub(super) fn available(hook: Hook) -> Hook {
    if hook == Hook::Tc && KernelVersion::current().is_ok_and(|kernel| kernel < KernelVersion::new(6, 6, 0)) {
        Hook::Clsact
    } else {
        hook
    }
}

/// Makes the qdisc that filters hang on; says whether it was not there before.
pub(super) fn add_clsact(interface: &str) -> Result<bool> {
    match qdisc_add_clsact(interface) {
        Ok(()) => Ok(true),
        Err(TcError::AlreadyAttached) => Ok(false),
        Err(error) => Err(error).with_context(|| {
            format!("cannot add a clsact qdisc to {interface}: the kernel refused; it needs CONFIG_NET_SCH_INGRESS, and root")
        }),
    }
}

/// Loads the program, attaches it, and pins what keeps it there. What a broken set-up left in the directory goes.
pub(super) fn attach(attachment: &mut Attachment) -> Result<()> {
    let Attachment { interface, hook, pins, .. } = &*attachment;
    bpf_file_system::ensure().context("cannot pin the program")?;
    remove_pins(pins)?;
    let pin_failed = || format!("cannot pin the program in {}: the kernel refused; run as root", pins.display());
    fs::create_dir_all(pins).with_context(pin_failed)?;
    fs::set_permissions(pins, Permissions::from_mode(0o700)).with_context(pin_failed)?;
    let mut ebpf =
        EbpfLoader::new()
            .map_pin_path(VIPS, pins.join(VIPS))
            .map_pin_path(OUTCOMES, pins.join(OUTCOMES))
            .load(OBJECT)
            .context("cannot load the decapsulation program: the kernel refused its maps; run as root on Linux 6.1 or newer")?;
    let name = if *hook == Hook::Xdp { "xdp_decap" } else { "tc_decap" };
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("cannot find the program {name} in bpfvs: it was built wrongly; build it anew"))?;
    let loading = || "cannot load the decapsulation program: the kernel refused it; run as root on Linux 6.1 or newer".to_owned();
    let attaching = || {
        let hook = if *hook == Hook::Xdp { "xdp" } else { "tc" };
        let other = if hook == "xdp" { "use --hook tc" } else { "see `tc filter show` and `bpftool net`" };
        format!(
            "cannot attach the decapsulation program to {interface} at {hook}: the kernel refused, perhaps because another program is there; {other}"
        )
    };
    let mut filter = None;
    if *hook == Hook::Xdp {
        let program: &mut Xdp = program.try_into()?;
        program.load().with_context(loading)?;
        program.pin(pins.join("program")).with_context(pin_failed)?;
        let link = program.attach(interface, XdpMode::default()).with_context(attaching)?;
        let link: FdLink = program.take_link(link)?.try_into().with_context(attaching)?;
        link.pin(pins.join("link")).with_context(pin_failed)?;
    } else {
        let options = if *hook == Hook::Tc {
            TcAttachOptions::TcxOrder(LinkOrder::default())
        } else {
            TcAttachOptions::Netlink(NlOptions::default())
        };
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().with_context(loading)?;
        program.pin(pins.join("program")).with_context(pin_failed)?;
        let link = program.attach_with_options(interface, TcAttachType::Ingress, options).with_context(attaching)?;
        let link = program.take_link(link)?;
        if *hook == Hook::Tc {
            let link: FdLink = link.try_into().with_context(attaching)?;
            link.pin(pins.join("link")).with_context(pin_failed)?;
        } else {
            filter = Some((link.priority()?, u32::from(link.handle()?)));
            // Dropping it would detach the filter, which shall stay.
            mem::forget(link);
        }
    }
    attachment.filter = filter;
    Ok(())
}

/// Detaches the program, and says whether it was still attached.
pub(super) async fn detach(network: &Network, attachment: &Attachment) -> Result<bool> {
    let attached = is_attached(network, attachment).await?;
    if attached && let Some((priority, handle)) = attachment.filter {
        SchedClassifierLink::attached(&attachment.interface, TcAttachType::Ingress, priority, TcHandle::from(handle), None)
            .map_err(ProgramError::IOError)
            .and_then(SchedClassifierLink::detach)
            .with_context(|| {
                let interface = &attachment.interface;
                format!("cannot remove the tc filter from {interface}: the kernel refused; run `tc filter del dev {interface} ingress prio {priority}`")
            })?;
    }
    remove_pins(&attachment.pins)?;
    Ok(attached)
}

/// Whether the program that was pinned is where it was attached: the interface may have been made anew since, or
/// somebody may have detached the program.
pub(super) async fn is_attached(network: &Network, attachment: &Attachment) -> Result<bool> {
    let Some(interface) = network.find(&attachment.interface).await? else { return Ok(false) };
    let Ok(pinned) = aya::programs::ProgramInfo::from_pin(attachment.pins.join("program")) else { return Ok(false) };
    if interface.index != attachment.index {
        return Ok(false);
    }
    match (attachment.hook, attachment.filter) {
        (Hook::Xdp, _) => Ok(interface.xdp.contains(&pinned.id())),
        (_, Some((priority, _))) => network.has_filter(&interface, priority).await,
        (_, None) => {
            let (_, programs) = SchedClassifier::query_tcx(&interface.name, TcAttachType::Ingress)
                .with_context(|| format!("cannot list the tc programs of {}: the kernel refused; run as root", interface.name))?;
            Ok(programs.iter().any(|program| program.id() == pinned.id()))
        }
    }
}

/// Makes the program accept exactly these addresses.
pub(super) fn accept(attachment: &Attachment, vips: &[Vip]) -> Result<()> {
    let wanted: Vec<(Ipv6, Accepts)> = vips.iter().filter_map(|vip| entry(attachment, vip)).collect();
    let mut map = addresses(attachment)?;
    let failed =
        || "cannot tell the decapsulation program the addresses: the kernel refused; run as root, with at most 1024 addresses";
    let present: Vec<Ipv6> = map.keys().collect::<Result<_, _>>().with_context(failed)?;
    for key in present.iter().filter(|key| !wanted.iter().any(|(wanted, _)| wanted == *key)) {
        map.remove(key).with_context(failed)?;
    }
    for (key, accepts) in &wanted {
        map.insert(key, accepts, 0).with_context(failed)?;
    }
    Ok(())
}

/// Whether the program accepts this address as it should.
pub(super) fn accepts(attachment: &Attachment, vip: &Vip) -> Result<bool> {
    let Some((key, accepts)) = entry(attachment, vip) else { return Ok(false) };
    Ok(addresses(attachment)?.get(&key, 0).is_ok_and(|found| found == accepts))
}

/// How many frames had which outcome, over all CPUs.
pub(super) fn outcomes(attachment: &Attachment) -> Result<Vec<(Outcome, u64)>> {
    let path = attachment.pins.join(OUTCOMES);
    let failed =
        || format!("cannot read the counters of the decapsulation program in {}: see the cause; run setup again", path.display());
    let map =
        PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(MapData::from_pin(&path).with_context(failed)?)).with_context(failed)?;
    let sum = |outcome: &Outcome| -> Result<(Outcome, u64)> {
        Ok((*outcome, map.get(&(*outcome as u32), 0).with_context(failed)?.iter().sum()))
    };
    Outcome::ALL.iter().map(sum).collect()
}

fn addresses(attachment: &Attachment) -> Result<HashMap<MapData, Ipv6, Accepts>> {
    let path = attachment.pins.join(VIPS);
    let failed =
        || format!("cannot open the decapsulation program's addresses in {}: see the cause; run setup again", path.display());
    HashMap::try_from(Map::HashMap(MapData::from_pin(&path).with_context(failed)?)).with_context(failed)
}

/// What the program's map says of this address, if its packets go through this program.
fn entry(attachment: &Attachment, vip: &Vip) -> Option<(Ipv6, Accepts)> {
    let Arrival::Program { hook, tunnel, port } = vip.arrival else { return None };
    if hook != attachment.hook || vip.interface != attachment.interface {
        return None;
    }
    let kind = match tunnel {
        TunnelType::Ipip => Kind::Ipip,
        TunnelType::Gue => Kind::Gue,
        TunnelType::Gre => Kind::Gre,
    };
    let key = match vip.address {
        IpAddr::V4(address) => tunnel::key(&u32::from_ne_bytes(address.octets())),
        IpAddr::V6(address) => {
            let bytes = address.octets();
            let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            tunnel::key(&[word(0), word(4), word(8), word(12)])
        }
    };
    Some((key, Accepts { kinds: kind as u32, port: port.to_be(), reserved: 0 }))
}
