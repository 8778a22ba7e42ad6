//! `check`: what keeps this real server from serving, in words, and what to do about it.
//!
//! It looks at the host as it is now, whoever set it up. Each finding is one thing that an administrator can look up and
//! change; a problem makes the exit code 1, a note is only good to know.

use std::net::IpAddr;

use anyhow::Result;

use super::{
    CheckArgs, Hook, Method, apply, decap,
    instance::Instance,
    network::{Held, Interface, Network},
    plan::{self, Wanted},
    report::Report,
    state::{Arrival, Attachment, Change, State, Vip},
    sysctl, validate,
};
use lb_common::packet::tunnel::Outcome;

/// The host as it is.
struct Host<'a> {
    network: &'a Network,
    interfaces: Vec<Interface>,
    addresses: Vec<Held>,
    attachments: Vec<Attachment>,
    report: Report,
}

/// Looks for everything that is wrong.
pub(super) async fn check(instance: &Instance, network: &Network, args: &CheckArgs) -> Result<Report> {
    let state = State::load(instance)?;
    let mut vips = state.vips.clone();
    for address in &args.vips {
        validate(*address)?;
    }
    if !args.vips.is_empty() {
        vips.retain(|vip| args.vips.contains(&vip.address));
        for address in args.vips.iter().filter(|address| !state.vips.iter().any(|vip| vip.address == **address)) {
            let interface = apply::receiving_interface(network, args.place.interface.as_deref(), &[*address]).await?;
            vips.push(by_hand(network, args.method, interface, *address).await?);
        }
    }
    let attachments = state.changes.into_iter().filter_map(|change| match change {
        Change::Program(attachment) => Some(attachment),
        _ => None,
    });
    let mut host = Host {
        network,
        interfaces: network.interfaces().await?,
        addresses: network.addresses().await?,
        attachments: attachments.collect(),
        report: Report { otherwise: "nothing is wrong", ..Report::default() },
    };
    if vips.is_empty() {
        host.report.problem(
            "nothing",
            "No virtual address is set up in this network namespace.".into(),
            "bpfvs realserver setup --vip VIP --method route|tunnel; or, if it was done by hand, name it: bpfvs realserver check --vip VIP".into(),
        );
    }
    for vip in &vips {
        host.check_address(vip);
        host.check_arrival(vip).await?;
    }
    host.check_interfaces(&vips);
    host.check_arp(&vips)?;
    host.check_way_back(&vips).await?;
    host.check_sizes(&vips);
    host.check_counters();
    Ok(host.report)
}

/// An address that somebody set up without us: in a tunnel, its packets can only come through a kernel device.
async fn by_hand(network: &Network, method: Method, interface: Interface, address: IpAddr) -> Result<Vip> {
    let arrival = match method {
        Method::Route => Arrival::Route,
        Method::Tunnel => {
            let interfaces = network.interfaces().await?;
            let tunnels = interfaces.into_iter().filter(|interface| interface.is_silent && !interface.is_loopback);
            Arrival::Device { devices: tunnels.map(|interface| interface.name).collect() }
        }
    };
    Ok(Vip { address, interface: interface.name, arrival })
}

impl Host<'_> {
    fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    /// The address is on an interface that keeps it to itself, with the prefix of a host.
    fn check_address(&mut self, vip: &Vip) {
        let address = vip.address;
        let prefix = plan::prefix(address);
        let add = format!("ip address add {address}/{prefix} dev lo");
        let held: Vec<Held> = self.addresses.iter().filter(|held| held.address == address).copied().collect();
        if held.is_empty() {
            self.report.problem(
                "vip-missing",
                format!("{address} is not an address of this host, which drops packets for it."),
                add.clone(),
            );
        }
        for held in held {
            let Some(interface) = self.interfaces.iter().find(|interface| interface.index == held.interface) else { continue };
            let (name, found) = (interface.name.clone(), held.prefix);
            let remove = format!("ip address del {address}/{found} dev {name}");
            if !interface.is_silent {
                self.report.problem(
                    "vip-announced",
                    format!("{address} is an address of {name}, so that this host answers for it in the network in place of the director."),
                    format!("{remove}; {add}"),
                );
            } else if found != prefix {
                self.report.problem(
                    "vip-prefix",
                    format!("{address} has the prefix /{found} on {name} and not /{prefix}: this host takes all addresses of that network for its own or for neighbours."),
                    format!("{remove}; {add}"),
                );
            }
        }
    }

    /// Somebody takes packets out of the tunnel, and the reverse path filter lets them live.
    async fn check_arrival(&mut self, vip: &Vip) -> Result<()> {
        match &vip.arrival {
            Arrival::Route => {}
            Arrival::Device { devices } => self.check_devices(vip, devices),
            Arrival::Program { hook, .. } => self.check_program(vip, *hook).await?,
        }
        if vip.address.is_ipv4() {
            let back = self.network.default_routes(false).await?;
            for name in plan::unwrapping_interfaces(vip) {
                let Some(interface) = self.interface(name) else { continue };
                // With the way back through the same interface even a strict filter is content.
                if back.contains(&interface.index) {
                    continue;
                }
                let name = name.to_owned();
                let effective = sysctl::effective(&name, Wanted::LooseReversePath.name())?;
                if !Wanted::LooseReversePath.is_met(effective) {
                    self.report.problem(
                        "rp-filter",
                        format!("rp_filter is strict on {name}: packets for {} that come out of the tunnel there are dropped, because no route leads back to the clients through it.", vip.address),
                        format!("sysctl -w {}=2 (loose); the larger value of all and the interface counts", sysctl::dotted(&sysctl::ipv4(&name, "rp_filter"))),
                    );
                }
            }
        }
        Ok(())
    }

    fn check_devices(&mut self, vip: &Vip, devices: &[String]) {
        if devices.is_empty() {
            self.report.problem(
                "tunnel-device",
                format!("There is no tunnel device, so that nobody takes packets for {} out of the tunnel.", vip.address),
                "modprobe ipip; ip link set tunl0 up; or bpfvs realserver setup --method tunnel".into(),
            );
        }
        for name in devices {
            let up = self.interface(name).map(|interface| interface.is_up);
            let (text, advice) = match up {
                Some(true) => continue,
                Some(false) => (format!("The tunnel device {name} is down"), format!("ip link set {name} up")),
                None => (format!("The tunnel device {name} is gone"), "bpfvs realserver setup, as before".into()),
            };
            self.report.problem("tunnel-device", format!("{text}: packets for {} stay in the tunnel.", vip.address), advice);
        }
    }

    async fn check_program(&mut self, vip: &Vip, hook: Hook) -> Result<()> {
        let attachment =
            self.attachments.iter().find(|attachment| attachment.interface == vip.interface && attachment.hook == hook).cloned();
        let again = || "bpfvs realserver setup, as before".to_owned();
        match attachment {
            Some(attachment) if decap::is_attached(self.network, &attachment).await? => {
                if !decap::accepts(&attachment, vip).unwrap_or(false) {
                    self.report.problem(
                        "decap-address",
                        format!(
                            "The decapsulation program on {} does not know {}, so that its packets stay in the tunnel.",
                            vip.interface, vip.address
                        ),
                        again(),
                    );
                }
            }
            _ => self.report.problem(
                "decap-program",
                format!(
                    "The decapsulation program is not attached to {}: packets for {} stay in the tunnel.",
                    vip.interface, vip.address
                ),
                again(),
            ),
        }
        Ok(())
    }

    fn check_interfaces(&mut self, vips: &[Vip]) {
        for name in distinct(vips.iter().map(|vip| vip.interface.as_str())) {
            let (text, advice) = match self.interface(name).map(|interface| interface.is_up) {
                Some(true) => continue,
                Some(false) => (format!("The interface {name} is down"), format!("ip link set {name} up")),
                None => (
                    format!("The interface {name} is gone"),
                    "bpfvs realserver teardown, then setup with the right --interface".into(),
                ),
            };
            self.report.problem("interface", format!("{text}: the director's packets cannot arrive."), advice);
        }
    }

    /// Nobody hears of the addresses by ARP.
    fn check_arp(&mut self, vips: &[Vip]) -> Result<()> {
        let ipv4: Vec<&Vip> = vips.iter().filter(|vip| vip.address.is_ipv4()).collect();
        for name in distinct(ipv4.iter().map(|vip| vip.interface.as_str())) {
            if self.interface(name).is_none() {
                continue;
            }
            for (wanted, subject, harm) in [
                (
                    Wanted::Ignore,
                    "arp-ignore",
                    "this host answers ARP requests for the virtual addresses, and takes their traffic away from the director",
                ),
                (
                    Wanted::Announce,
                    "arp-announce",
                    "this host may name a virtual address as its own in ARP requests, and routers that hear them send its traffic here",
                ),
            ] {
                let effective = sysctl::effective(name, wanted.name())?;
                if !wanted.is_met(effective) {
                    let key = |interface| sysctl::dotted(&sysctl::ipv4(interface, wanted.name()));
                    self.report.problem(
                        subject,
                        format!("{} is {effective} on {name} (the larger value of all and {name} counts): {harm}.", wanted.name()),
                        format!("sysctl -w {}={value} {}={value}", key("all"), key(name), value = wanted.value()),
                    );
                }
            }
        }
        Ok(())
    }

    /// Answers find their way to clients, without the director.
    async fn check_way_back(&mut self, vips: &[Vip]) -> Result<()> {
        for (ipv6, family) in [(false, "IPv4"), (true, "IPv6")] {
            if vips.iter().any(|vip| vip.address.is_ipv6() == ipv6) && self.network.default_routes(ipv6).await?.is_empty() {
                self.report.problem(
                    "route-back",
                    format!("There is no default route for {family}: answers reach only clients in the networks of this host, because they go to the clients directly and not through the director."),
                    format!("ip {}route add default via ROUTER", if ipv6 { "-6 " } else { "" }),
                );
            }
        }
        Ok(())
    }

    /// What is good to know about packet sizes.
    fn check_sizes(&mut self, vips: &[Vip]) {
        let tunnelled: Vec<&Vip> = vips.iter().filter(|vip| vip.arrival != Arrival::Route).collect();
        for name in distinct(tunnelled.iter().map(|vip| vip.interface.as_str())) {
            let Some(mtu) = self.interface(name).map(|interface| interface.mtu) else { continue };
            if mtu <= 1500 {
                self.report.note(
                    "mtu",
                    format!("The MTU of {name} is {mtu}: a client's packet must be at least 20 bytes smaller to fit into the tunnel, and clients learn that only by ICMP (fragmentation needed, packet too big)."),
                    "let ICMP pass between director and clients, or raise the MTU between director and real servers".into(),
                );
            }
        }
    }

    /// What the program has met that should not be.
    fn check_counters(&mut self) {
        for attachment in self.attachments.clone() {
            let Ok(outcomes) = decap::outcomes(&attachment) else { continue };
            for (outcome, count) in outcomes.into_iter().filter(|(_, count)| *count > 0) {
                let (meaning, advice) = match outcome {
                    Outcome::Fragment => (
                        "were fragments of tunnel packets, which are not put together",
                        "make the director's tunnel fit the network's MTU",
                    ),
                    Outcome::Failed => (
                        "could not be unwrapped by the kernel, and were dropped",
                        "switch off UDP receive offloads on the interface (ethtool -K)",
                    ),
                    Outcome::NotServed => (
                        "came in a tunnel, for an address that is not set up or through another kind of tunnel",
                        "compare --tunnel-type and --tunnel-port with the director's",
                    ),
                    Outcome::Congested => (
                        "were dropped because the network was congested and the sender does not know ECN",
                        "nothing: this is as it should be",
                    ),
                    Outcome::Decapsulated | Outcome::Malformed | Outcome::NotHere | Outcome::NotTunnelled => continue,
                };
                self.report.note("decap-counter", format!("{count} packets on {} {meaning}.", attachment.interface), advice.into());
            }
        }
    }
}

/// Each name once, in order of appearance.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut distinct = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}
