//! `setup`: brings the host to what the plan says, or leaves it as it was.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};

use super::{
    Decapsulation, Method, SetupArgs, TunnelType, decap,
    instance::Instance,
    network::{Device, Interface, Made, Network},
    plan::{self, Setting, Wanted},
    report::Report,
    state::{self, Arrival, Attachment, Change, State, Vip},
    sysctl, undo, validate,
};

/// A host on its way from one state to the next.
struct Setup<'a> {
    instance: &'a Instance,
    network: &'a Network,
    state: State,
    report: Report,
}

/// Sets virtual addresses up; if anything fails, undoes what this call had done.
pub(super) async fn setup(instance: &Instance, network: &Network, args: &SetupArgs) -> Result<Report> {
    for vip in &args.vips {
        validate(*vip)?;
    }
    match (args.method, args.tunnel_type, args.tunnel_port) {
        (Method::Tunnel, TunnelType::Gue, None) => {
            bail!(
                "cannot set up a gue tunnel: its UDP port is not known; give --tunnel-port as the director has it (ipvsadm: --tun-port)"
            )
        }
        (Method::Route, _, Some(port)) | (_, TunnelType::Ipip | TunnelType::Gre, Some(port)) => {
            bail!(
                "cannot use --tunnel-port {port}: only a gue tunnel has a port; leave it out or give --method tunnel --tunnel-type gue"
            )
        }
        _ => {}
    }
    let _lock = state::lock(instance)?;
    let before = State::load(instance)?;
    let interface = receiving_interface(network, args.place.interface.as_deref(), &args.vips).await?;
    for vip in &args.vips {
        check_place(network, *vip).await?;
    }
    let report = Report { otherwise: "already set up: nothing to change", ..Report::default() };
    let mut setup = Setup { instance, network, state: before.clone(), report };
    match setup.run(args, &interface).await {
        Ok(()) => Ok(setup.report),
        Err(error) => {
            let mut undone = Report::default();
            setup.state.vips.clone_from(&before.vips);
            let added = setup.state.changes.split_off(before.changes.len().min(setup.state.changes.len()));
            for change in added.iter().rev() {
                // The first error is the one to tell; what cannot be undone now stays on record for teardown.
                if undo::undo(network, change, &mut undone).await.is_err() {
                    setup.state.changes.push(change.clone());
                }
            }
            setup.tell_programs().context(error.to_string())?;
            setup.state.save(instance).context(error.to_string())?;
            Err(error)
        }
    }
}

impl Setup<'_> {
    async fn run(&mut self, args: &SetupArgs, interface: &Interface) -> Result<()> {
        let mut vips = Vec::new();
        for address in &args.vips {
            let arrival = self.arrival(args, interface, *address).await?;
            vips.push(Vip { address: *address, interface: interface.name.clone(), arrival });
        }
        self.state.vips.retain(|known| !vips.iter().any(|vip| vip.address == known.address));
        self.state.vips.extend(vips);
        // First what keeps the address a secret, then the address.
        self.set_devices_up().await?;
        for setting in plan::settings(&self.state.vips) {
            self.set(&setting)?;
        }
        self.attach_programs().await?;
        self.tell_programs()?;
        self.add_addresses().await?;
        undo::remove_what_nobody_needs(self.network, &mut self.state, &mut self.report).await?;
        self.state.save(self.instance)
    }

    /// Writes down that a change is about to be made.
    fn record(&mut self, change: Change) -> Result<()> {
        if !self.state.changes.contains(&change) {
            self.state.changes.push(change);
        }
        self.state.save(self.instance)
    }

    /// Decides who takes packets out of the tunnel.
    async fn arrival(&mut self, args: &SetupArgs, interface: &Interface, vip: IpAddr) -> Result<Arrival> {
        if args.method == Method::Route {
            return Ok(Arrival::Route);
        }
        if args.decap != Decapsulation::Bpf {
            let (devices, missing) = self.devices(args.tunnel_type, interface, vip).await?;
            match (missing, args.decap) {
                (None, _) => return Ok(Arrival::Device { devices }),
                (Some(why), Decapsulation::Kernel) if devices.is_empty() => {
                    bail!("cannot let the kernel take packets out of the tunnel: {why}; use --decap bpf")
                }
                // The director may never use the tunnels that are missing: it goes by the real server's address.
                (Some(why), Decapsulation::Kernel) => {
                    self.report.note(
                        "tunnel",
                        format!("the kernel does not take all tunnels for {vip} apart that can reach this host: {why}"),
                        "let the director use an address of this host of the VIP's own family, or give --decap bpf".to_owned(),
                    );
                    return Ok(Arrival::Device { devices });
                }
                _ => {}
            }
        }
        Ok(Arrival::Program { hook: decap::available(args.hook), tunnel: args.tunnel_type, port: args.tunnel_port.unwrap_or(0) })
    }

    /// The kernel's devices that end such tunnels from the families in which this host can be reached, and why some family
    /// has none.
    async fn devices(&mut self, tunnel: TunnelType, interface: &Interface, vip: IpAddr) -> Result<(Vec<String>, Option<String>)> {
        let addresses = self.network.addresses().await?;
        let reachable = |ipv6: bool| {
            addresses.iter().any(|held| match held.address {
                IpAddr::V4(_) => !ipv6 && held.interface == interface.index,
                IpAddr::V6(address) => ipv6 && held.interface == interface.index && !address.is_unicast_link_local(),
            })
        };
        let (mut names, mut missing) = (Vec::new(), None);
        for outer_ipv6 in [false, true].into_iter().filter(|outer| reachable(*outer)) {
            let device = match (tunnel, outer_ipv6, vip.is_ipv6()) {
                (TunnelType::Ipip, false, false) => Device::Ipip,
                (TunnelType::Ipip, false, true) => Device::Sit,
                (TunnelType::Ipip, true, true) => Device::Ip6tnl,
                (TunnelType::Gre, false, _) => Device::Gre,
                (TunnelType::Gre, true, _) => Device::Ip6gre,
                (TunnelType::Ipip, true, false) => {
                    missing = Some("its device for IPv6 tunnels takes no IPv4 packets from everybody".to_owned());
                    continue;
                }
                (TunnelType::Gue, ..) => {
                    missing = Some("it needs a port of its FOU module, which bpfvs does not manage (`ip fou add`)".to_owned());
                    continue;
                }
            };
            match self.device(device).await? {
                Some(name) => names.push(name),
                None => missing = Some(format!("it has no device like {} (module not there)", device.fallback())),
            }
        }
        if names.is_empty() && missing.is_none() {
            missing = Some(format!("{} has no address to which a tunnel could lead", interface.name));
        }
        Ok((names, missing))
    }

    /// Finds or makes a device.
    async fn device(&mut self, device: Device) -> Result<Option<String>> {
        let own = format!("bpfvs-{}", device.fallback().trim_end_matches('0'));
        for name in [device.fallback(), &own] {
            if self.network.find(name).await?.is_some() {
                return Ok(Some(name.to_owned()));
            }
        }
        match self.network.make_device(device, &own).await? {
            Made::Unsupported => Ok(None),
            Made::Yes => {
                self.record(Change::DeviceMade { name: own.clone() })?;
                self.report.changes.push(format!("tunnel device {own} made"));
                Ok(Some(own))
            }
            Made::Exists => Ok(self.network.find(device.fallback()).await?.map(|interface| interface.name)),
        }
    }

    async fn set_devices_up(&mut self) -> Result<()> {
        let devices: Vec<String> = self
            .state
            .vips
            .iter()
            .filter_map(|vip| match &vip.arrival {
                Arrival::Device { devices } => Some(devices.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        for name in devices {
            if let Some(interface) = self.network.find(&name).await?
                && !interface.is_up
            {
                self.record(Change::DeviceUp { name: name.clone() })?;
                self.network.set_up(&interface, true).await?;
                self.report.changes.push(format!("tunnel device {name} set up"));
            }
        }
        Ok(())
    }

    fn set(&mut self, setting: &Setting) -> Result<()> {
        let key = &setting.key;
        let before = sysctl::read(key)?;
        let number = || {
            before
                .parse::<i64>()
                .with_context(|| format!("cannot understand {}: {before:?} is no number; set it anew", sysctl::dotted(key)))
        };
        let counts = match (setting.wanted, key.split('/').nth_back(1)) {
            (Wanted::LooseReversePath, Some(interface)) => sysctl::effective(interface, setting.wanted.name())?,
            _ => number()?,
        };
        if setting.wanted.is_met(counts) {
            return Ok(());
        }
        let set = setting.wanted.value();
        // If somebody has changed our value since, his is not the one from before us: that stays on record.
        match self.state.changes.iter_mut().find(|change| matches!(change, Change::Sysctl { key: known, .. } if known == key)) {
            Some(_) => {}
            None => self.record(Change::Sysctl { key: key.clone(), before: before.clone(), set: set.into() })?,
        }
        sysctl::write(key, set)?;
        self.report.changes.push(format!("{}: {before} -> {set}", sysctl::dotted(key)));
        Ok(())
    }

    async fn attach_programs(&mut self) -> Result<()> {
        let wanted: Vec<_> = plan::programs(&self.state.vips).into_iter().map(|(name, hook)| (name.to_owned(), hook)).collect();
        for (name, hook) in wanted {
            let known = self.state.changes.iter().find_map(|change| match change {
                Change::Program(attachment) if attachment.interface == name && attachment.hook == hook => Some(attachment.clone()),
                _ => None,
            });
            if let Some(attachment) = known {
                if decap::is_attached(self.network, &attachment).await? {
                    continue;
                }
                decap::detach(self.network, &attachment).await?;
                self.state.changes.retain(|change| *change != Change::Program(attachment.clone()));
            }
            let Some(interface) = self.network.find(&name).await? else {
                bail!("cannot attach the decapsulation program: there is no interface {name}; tear down its addresses or make it");
            };
            if hook == super::Hook::Clsact {
                let qdisc = Change::Qdisc { interface: name.clone() };
                if decap::add_clsact(&name)? {
                    self.record(qdisc)?;
                }
            }
            let pins = self.instance.pins(interface.index);
            let mut attachment = Attachment { interface: name.clone(), index: interface.index, hook, pins, filter: None };
            self.record(Change::Program(attachment.clone()))?;
            let attached = decap::attach(&mut attachment);
            // Only now the filter's number is known.
            self.state.changes.pop();
            self.record(Change::Program(attachment))?;
            attached?;
            self.report.changes.push(format!("decapsulation program attached to {name}"));
        }
        Ok(())
    }

    /// Brings the addresses in the programs' maps up to date.
    fn tell_programs(&self) -> Result<()> {
        for change in &self.state.changes {
            if let Change::Program(attachment) = change
                && plan::needs(&self.state.vips, change)
            {
                decap::accept(attachment, &self.state.vips)?;
            }
        }
        Ok(())
    }

    async fn add_addresses(&mut self) -> Result<()> {
        let loopback = self.network.loopback().await?;
        let held = self.network.addresses().await?;
        let missing: Vec<IpAddr> = self
            .state
            .vips
            .iter()
            .map(|vip| vip.address)
            .filter(|address| !held.iter().any(|held| held.address == *address))
            .collect();
        for address in missing {
            self.record(Change::Address { address })?;
            self.network.add_address(loopback.index, address, plan::prefix(address)).await?;
            self.report.changes.push(format!("{address}/{} added to {}", plan::prefix(address), loopback.name));
        }
        if !loopback.is_up {
            self.report.note(
                "loopback",
                format!(
                    "{} is down: services that listen on every address work, but nothing local can reach the addresses on it.",
                    loopback.name
                ),
                format!("ip link set {} up", loopback.name),
            );
        }
        Ok(())
    }
}

/// Refuses an address that stands where it would be announced, or with a prefix that makes others local.
async fn check_place(network: &Network, vip: IpAddr) -> Result<()> {
    let interfaces = network.interfaces().await?;
    for held in network.addresses().await?.iter().filter(|held| held.address == vip) {
        let Some(interface) = interfaces.iter().find(|interface| interface.index == held.interface) else { continue };
        let (name, prefix) = (&interface.name, held.prefix);
        if !interface.is_silent {
            bail!(
                "cannot serve {vip} here: it is an address of {name}, which would answer for it in the network, where the director must; remove it (ip address del {vip}/{prefix} dev {name})"
            );
        }
        if prefix != plan::prefix(vip) {
            bail!(
                "cannot serve {vip} here: it is on {name} with the prefix /{prefix}, which makes all its neighbours local; remove it (ip address del {vip}/{prefix} dev {name})"
            );
        }
    }
    Ok(())
}

/// The interface where the director's packets arrive: the named one, or that of the default route, or the only one.
pub(super) async fn receiving_interface(network: &Network, name: Option<&str>, vips: &[IpAddr]) -> Result<Interface> {
    let mut interfaces = network.interfaces().await?;
    interfaces.retain(|interface| !interface.is_loopback);
    let names = interfaces.iter().map(|interface| interface.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(name) = name {
        let found = interfaces.iter().find(|interface| interface.name == name).cloned();
        return found.with_context(|| format!("cannot use the interface {name}: there is none of this name; there are: {names}"));
    }
    for ipv6 in [vips.iter().all(IpAddr::is_ipv6), vips.iter().any(IpAddr::is_ipv6)] {
        if let Some(index) = network.default_routes(ipv6).await?.first()
            && let Some(interface) = interfaces.iter().find(|interface| interface.index == *index)
        {
            return Ok(interface.clone());
        }
    }
    interfaces.retain(|interface| interface.is_up && !interface.is_silent);
    match &interfaces[..] {
        [only] => Ok(only.clone()),
        _ => bail!(
            "cannot tell where the director's packets arrive: there is no default route and not exactly one interface that is up; give --interface, one of: {names}"
        ),
    }
}
