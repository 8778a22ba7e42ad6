//! Which interfaces the director's programs run on, and how they get there and away.
//!
//! | hook | what is attached |
//! | --- | --- |
//! | `auto` | XDP in the driver and tc on physical network cards; tc alone on virtual devices, where XDP would cost more than it gains |
//! | `xdp` | XDP, in the driver or else the generic one, and tc behind it for what XDP cannot finish |
//! | `tc` | tc alone: a tcx link, or a netlink filter on kernels before 6.6 |
//!
//! Links are pinned (`links/xdp-2`, `links/tc-2`), so that they outlive the daemon; the next one puts its programs into
//! the links that it finds, and no packet passes in between without a program. Netlink filters cannot be pinned, but have a fixed
//! place, and are replaced in it.
//!
//! If no interface is named, every one that is up is attached to, also those that come later. This module is told of
//! interfaces by [`super::resolve`], and asks netlink nothing itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, XdpMode,
        links::{FdLink, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact, qdisc_detach_program},
        xdp::XdpLink,
    },
    util::KernelVersion,
};

use super::{
    links::{Link, Links},
    maps::{Pins, remove_pin},
    mark_device,
    programs::Programs,
};
use crate::director::model::{Hook, InterfaceView};

/// Where our netlink filter stands on kernels without tcx: early, at a handle that nobody else deals.
const FILTER_PRIORITY: u16 = 7;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x0b5f);
/// What the kernel calls our netlink filter.
const FILTER_NAME: &str = "tc_director";

/// An interface that the programs run on.
#[derive(Clone, Debug)]
struct Attached {
    name: String,
    /// Whether XDP runs in generic mode, if it runs.
    generic_xdp: Option<bool>,
}

/// The programs and the interfaces that they run on.
#[derive(Debug)]
pub struct Attachments {
    programs: Programs,
    pins: Pins,
    hook: Hook,
    /// Whether tc programs are attached by tcx links.
    tcx: bool,
    /// Whether every interface is wanted that is up.
    all: bool,
    /// Interfaces that were named, with their hooks.
    named: BTreeMap<String, Hook>,
    /// Interfaces that were taken away again.
    unwanted: BTreeSet<String>,
    links: Links,
    attached: BTreeMap<u32, Attached>,
}

impl Attachments {
    /// Nothing is attached yet. No names mean every interface that is up.
    pub fn new(programs: Programs, pins: Pins, hook: Hook, tcx: bool, interfaces: &[String]) -> Self {
        Self {
            programs,
            pins,
            hook,
            tcx,
            all: interfaces.is_empty(),
            named: interfaces.iter().map(|name| (name.clone(), hook)).collect(),
            unwanted: BTreeSet::new(),
            links: Links::new(),
            attached: BTreeMap::new(),
        }
    }

    /// Whether this kernel has tcx links.
    pub fn kernel_has_tcx() -> bool {
        KernelVersion::current().is_ok_and(|version| version.code() >= 6 << 16 | 6 << 8)
    }

    /// Attaches to the wanted interfaces, and detaches from those that an earlier daemon wanted.
    ///
    /// It is an error if an interface that was named does not exist or cannot be attached to.
    pub fn begin(&mut self, links: &Links) -> anyhow::Result<()> {
        self.links.clone_from(links);
        if let Some(missing) = self.named.keys().find(|name| links.values().all(|link| link.name != **name)) {
            let names: Vec<_> = links.values().map(|link| link.name.as_str()).collect();
            bail!("there is no interface {missing} in this network namespace; there are {}", names.join(", "));
        }
        for link in links.values() {
            let Some(hook) = self.wanted(link) else { continue };
            let result = self.attach_to(link, hook);
            if self.named.contains_key(&link.name) {
                result?;
            } else if let Err(error) = result {
                tracing::warn!("{error:#}");
            }
        }
        for (hook, ifindex) in self.pins.links() {
            if !self.attached.contains_key(&ifindex) {
                unpin(&self.pins.link(&hook, ifindex))?;
            }
        }
        if !self.tcx {
            let others: Vec<_> = links.values().filter(|link| !self.attached.contains_key(&link.index)).cloned().collect();
            for link in &others {
                remove_filter(&link.name);
            }
        }
        Ok(())
    }

    /// An interface is there, or has changed.
    pub fn follow(&mut self, link: &Link) {
        self.links.insert(link.index, link.clone());
        if let Some(attached) = self.attached.get_mut(&link.index) {
            attached.name.clone_from(&link.name);
            return;
        }
        if let Some(hook) = self.wanted(link)
            && let Err(error) = self.attach_to(link, hook)
        {
            tracing::warn!("{error:#}");
        }
    }

    /// An interface is no more.
    pub fn gone(&mut self, ifindex: u32) {
        self.links.remove(&ifindex);
        if let Some(attached) = self.attached.remove(&ifindex) {
            tracing::info!(interface = attached.name, "interface gone");
        }
        for hook in ["xdp", "tc"] {
            if let Err(error) = unpin(&self.pins.link(hook, ifindex)) {
                tracing::warn!("{error:#}");
            }
        }
    }

    /// Attaches to an interface by name, now and whenever it comes back.
    pub fn attach(&mut self, name: &str, hook: Hook) -> anyhow::Result<()> {
        let link = self.by_name(name)?;
        self.attach_to(&link, hook)?;
        self.unwanted.remove(name);
        self.named.insert(name.to_owned(), hook);
        Ok(())
    }

    /// Detaches from an interface by name, and leaves it alone.
    pub fn detach(&mut self, name: &str) -> anyhow::Result<()> {
        let link = self.by_name(name)?;
        if !self.attached.contains_key(&link.index) {
            bail!("bpfvs is not attached to the interface {name}, so it cannot be detached; `bpfvs status` lists the interfaces");
        }
        self.remove_xdp(link.index)?;
        self.remove_tc(&link)?;
        self.attached.remove(&link.index);
        self.named.remove(name);
        self.unwanted.insert(name.to_owned());
        tracing::info!(interface = name, "detached");
        Ok(())
    }

    /// Detaches from every interface.
    pub fn detach_all(&mut self) -> anyhow::Result<()> {
        for ifindex in std::mem::take(&mut self.attached).into_keys() {
            self.remove_xdp(ifindex)?;
            if let Some(link) = self.links.get(&ifindex) {
                self.remove_tc(link)?;
            }
        }
        Ok(())
    }

    /// Makes the programs ready to masquerade.
    pub fn translate(&mut self) -> anyhow::Result<()> {
        self.programs.load_translation()
    }

    /// The same between IPv6 and IPv4.
    pub fn cross(&mut self) -> anyhow::Result<()> {
        self.programs.load_crossing()
    }

    /// Makes the programs ready to read SIP.
    pub fn read_sip(&mut self) -> anyhow::Result<()> {
        self.programs.load_sip()
    }

    /// The interfaces that the programs run on.
    pub fn interfaces(&self) -> Vec<InterfaceView> {
        let xdp = |generic| if generic { "xdp-generic" } else { "xdp" }.to_owned();
        self.attached
            .iter()
            .map(|(index, attached)| InterfaceView {
                name: attached.name.clone(),
                index: *index,
                xdp: attached.generic_xdp.map(xdp),
                tc: true,
            })
            .collect()
    }

    /// How many instructions the verifier walked through for each program.
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        self.programs.verified_instructions()
    }

    fn by_name(&self, name: &str) -> anyhow::Result<Link> {
        let link = self.links.values().find(|link| link.name == name);
        link.cloned().ok_or_else(|| anyhow!("there is no interface {name} in this network namespace; `ip link` lists them"))
    }

    fn wanted(&self, link: &Link) -> Option<Hook> {
        if self.unwanted.contains(&link.name) || link.name == mark_device::ENTRANCE {
            return None;
        }
        if link.name == mark_device::EXIT {
            return Some(Hook::Tc);
        }
        self.named.get(&link.name).copied().or_else(|| (self.all && link.up && !link.loopback).then_some(self.hook))
    }

    fn attach_to(&mut self, link: &Link, hook: Hook) -> anyhow::Result<()> {
        // tc first: what XDP leaves unfinished must not fall through.
        self.attach_tc(link)?;
        let modes: &[XdpMode] = match hook {
            Hook::Xdp => &[XdpMode::Driver, XdpMode::Skb],
            Hook::Auto if !link.virtual_device => &[XdpMode::Driver],
            Hook::Auto | Hook::Tc => &[],
        };
        let generic_xdp = if modes.is_empty() {
            self.remove_xdp(link.index)?;
            None
        } else {
            // That the kernel refuses the program is no matter of this interface.
            self.programs.xdp()?;
            match self.attach_xdp(link, modes) {
                Ok(generic) => Some(generic),
                Err(error) if hook == Hook::Auto => {
                    tracing::info!("{error:#}; tc does all the work there");
                    None
                }
                Err(error) => return Err(error),
            }
        };
        let xdp = generic_xdp.map(|generic| if generic { "generic" } else { "driver" });
        tracing::info!(interface = link.name, xdp, "attached");
        self.attached.insert(link.index, Attached { name: link.name.clone(), generic_xdp });
        Ok(())
    }

    /// Attaches XDP in the first of these modes that works. `true` for generic mode.
    fn attach_xdp(&mut self, link: &Link, modes: &[XdpMode]) -> anyhow::Result<bool> {
        let pin = self.pins.link("xdp", link.index);
        let program = self.programs.xdp()?;
        if pin.exists() {
            let generic = link.generic_xdp.unwrap_or(false);
            let mode = if generic { XdpMode::Skb } else { XdpMode::Driver };
            if modes.contains(&mode) {
                let replaced = || -> anyhow::Result<()> {
                    let old: XdpLink = FdLink::from(PinnedLink::from_pin(&pin)?).try_into()?;
                    let id = program.attach_to_link(old)?;
                    // The pin holds the link; we need not.
                    drop(program.take_link(id)?);
                    Ok(())
                }();
                match replaced {
                    Ok(()) => return Ok(generic),
                    Err(error) => tracing::debug!(interface = link.name, "the pinned XDP link is dead: {error:#}"),
                }
            }
            unpin(&pin)?;
        }
        let mut refusal = None;
        for &mode in modes {
            match program.attach_to_if_index(link.index, mode) {
                Ok(id) => {
                    let attached: FdLink = program.take_link(id)?.try_into()?;
                    attached
                        .pin(&pin)
                        .with_context(|| format!("the XDP link to {} cannot be pinned at {}", link.name, pin.display()))?;
                    return Ok(mode == XdpMode::Skb);
                }
                Err(error) => refusal = Some(error),
            }
        }
        Err(match refusal {
            Some(error) if is_busy(&error) => {
                anyhow!(
                    "XDP cannot be attached to {}: another XDP program runs there; remove it (`ip link set {0} xdp off`), or use `--hook tc`",
                    link.name
                )
            }
            Some(error) => anyhow!(error).context(format!("XDP cannot be attached to {}; `--hook tc` does without", link.name)),
            None => anyhow!("XDP cannot be attached to {}: no mode is allowed", link.name),
        })
    }

    fn attach_tc(&mut self, link: &Link) -> anyhow::Result<()> {
        let tcx = self.tcx;
        let pin = self.pins.link("tc", link.index);
        let program = self.programs.tc()?;
        let attached = if tcx { attach_tcx(program, link, &pin) } else { attach_filter(program, link) };
        attached.with_context(|| format!("tc cannot be attached to {}; the kernel needs CONFIG_NET_CLS_ACT, and before 6.6 the modules sch_ingress and cls_bpf", link.name))
    }

    fn remove_xdp(&self, ifindex: u32) -> anyhow::Result<()> {
        unpin(&self.pins.link("xdp", ifindex))
    }

    fn remove_tc(&self, link: &Link) -> anyhow::Result<()> {
        if !self.tcx {
            remove_filter(&link.name);
        }
        unpin(&self.pins.link("tc", link.index))
    }
}

fn attach_tcx(program: &mut SchedClassifier, link: &Link, pin: &Path) -> anyhow::Result<()> {
    if pin.exists() {
        let replaced = || -> anyhow::Result<()> {
            let old: SchedClassifierLink = FdLink::from(PinnedLink::from_pin(pin)?).try_into()?;
            let id = program.attach_to_link(old)?;
            drop(program.take_link(id)?);
            Ok(())
        }();
        match replaced {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(interface = link.name, "the pinned tcx link is dead: {error:#}"),
        }
        unpin(pin)?;
    }
    let id = program.attach_with_options(&link.name, TcAttachType::Ingress, TcAttachOptions::TcxOrder(LinkOrder::first()))?;
    let attached: FdLink = program.take_link(id)?.try_into()?;
    attached.pin(pin).with_context(|| format!("the link cannot be pinned at {}", pin.display()))?;
    Ok(())
}

/// Attaches by netlink: replaces our filter where it is, or makes it.
fn attach_filter(program: &mut SchedClassifier, link: &Link) -> anyhow::Result<()> {
    match qdisc_add_clsact(&link.name) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(TcError::AlreadyAttached) | Ok(()) => {}
        Err(error) => return Err(error).context("the qdisc clsact cannot be added"),
    }
    let place = SchedClassifierLink::attached(&link.name, TcAttachType::Ingress, FILTER_PRIORITY, FILTER_HANDLE, None)?;
    let id = match program.attach_to_link(place) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(
            &link.name,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None }),
        )?,
    };
    // Dropped, it would take the filter away, which has to outlive the daemon.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes our netlink filter, if it is there.
pub fn remove_filter(interface: &str) {
    // Nothing to remove is an error of several kinds, depending on what else is there.
    if let Err(error) = qdisc_detach_program(interface, TcAttachType::Ingress, FILTER_NAME) {
        tracing::trace!(interface, %error, "no filter to remove");
    }
}

fn unpin(path: &Path) -> anyhow::Result<()> {
    remove_pin(path)
        .with_context(|| format!("the pinned link {} cannot be removed; remove it by hand to detach the program", path.display()))
}

fn is_busy(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(error) => matches!(error.io_error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)),
        _ => false,
    }
}
