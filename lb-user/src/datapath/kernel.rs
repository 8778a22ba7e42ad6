//! The real datapath: [`Datapath`] over the kernel's maps and programs.
//!
//! ```text
//! KernelDatapath ── services, filter, runs        what the director decides, written at once
//!              ├── servers    <── resolve         joined with what netlink says, by a task of its own
//!              ├── attachments <── resolve        the interfaces
//!              └── sweep, connections, reasons    what the kernel counts
//! ```
//!
//! [`KernelDatapath::open`] takes over an instance that it finds, or makes one; nothing is attached yet, so the director
//! can write its configuration first. [`KernelDatapath::start`] then opens netlink in the thread's network namespace, attaches, and
//! spawns the task that follows netlink. All else is synchronous. Dropped, it leaves everything running in the kernel:
//! traffic goes on. [`KernelDatapath::remove`] takes everything away.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use aya::maps::{Array, MapData, PerCpuArray, PerCpuValues};
use lb_common::{
    config::{Config, LAYOUT, SweepReport},
    server::{Counters, NextHop, Server, Status},
    service::{Mode, Service, flags as service_flags},
    statistics::Statistics,
    template::Scope,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Datapath, Error, Target,
    attach::{Attachments, remove_filter},
    bell::Bell,
    capacity::Tables,
    connections::{Clock, Connections},
    detour::{Demand, Detours},
    devices::Devices,
    flood::Flood,
    hz, kernel_error,
    links::{self},
    listing::{self, Listing},
    locality::{Destinations, Standings},
    locals::Locals,
    maps::{Found, Pins, inspect},
    mark_device::{self, Guard, MarkDevice},
    programs::Programs,
    reasons::Reasons,
    resolve::{Order, Resolver, lock},
    runs::Runs,
    servers::Servers,
    services::Services,
    shared::Words,
    sweep::{SweepOutcome, Sweeper},
    take_over::{Place, Successor, Surroundings},
    tell::{Teller, Told},
    templates::Templates,
};
use crate::{
    director::model::{Family, FloodView, Hook, InterfaceView, LocalUsage, MarkRule, Method, ReasonView, ServiceId, TableMemory},
    scheduler::Run,
    synchronisation::{LeftOut, changes::Changes, message::Entry},
};

/// What the programs are loaded with until the real rate is known. Distributions choose it.
const LIKELY_HZ: u32 = 250;

/// How to open a datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the instance is pinned, such as `/sys/fs/bpf/bpfvs/main`.
    pub directory: PathBuf,
    /// The cookie of the network namespace; see [`super::netns_cookie`].
    pub netns_cookie: u64,
    /// Size of each connection table, if somebody asks for one. A table that is taken over keeps its own.
    pub max_connections: Option<u32>,
    /// When they take the memory for their entries, if somebody asks. A table that is taken over keeps its own way.
    pub memory: Option<TableMemory>,
    /// How many picks of a service a CPU takes at once.
    pub picks_at_once: u32,
    /// How to hook into interfaces.
    pub hook: Hook,
    /// The interfaces; none for every one that is up.
    pub interfaces: Vec<String>,
    /// Whether to attach tc programs by tcx links; [`Attachments::kernel_has_tcx`] says whether the kernel can.
    pub tcx: bool,
}

/// The datapath in the kernel.
pub struct KernelDatapath {
    pins: Pins,
    adopted: bool,
    config: Config,
    config_map: Array<MapData, Config>,
    services: Services,
    runs: Runs,
    standings: Standings,
    destinations: Destinations,
    templates: Templates,
    locals: Locals,
    counters: Words,
    peaks: Words,
    flood: Flood,
    /// Something once it is started.
    bell: Option<Bell>,
    swept: Words,
    statistics: PerCpuArray<MapData, Statistics>,
    servers: Arc<Mutex<Servers>>,
    attachments: Arc<Mutex<Attachments>>,
    mark_device: Arc<Mutex<MarkDevice>>,
    /// What that is for.
    demand: Arc<Mutex<Demand>>,
    sweeper: Arc<Mutex<Sweeper>>,
    /// What the last sweep, or the present one, says. Not the sweeper's, because nobody may wait for that.
    swept_report: Arc<Array<MapData, SweepReport>>,
    teller: Arc<Mutex<Teller>>,
    successor: Successor,
    connections: Connections,
    reasons: Reasons,
    orders: mpsc::UnboundedSender<Order>,
    /// How many orders were given, and how many carried out.
    asked: u64,
    answered: watch::Receiver<u64>,
    /// The task's ends of both, until it starts.
    task: Option<(mpsc::UnboundedReceiver<Order>, watch::Sender<u64>)>,
}

impl KernelDatapath {
    /// Takes over the instance at these pins, or makes one. Attaches nothing yet.
    pub fn open(options: &Options) -> anyhow::Result<Self> {
        let pins = Pins::new(&options.directory);
        let found = match inspect(&pins, options.netns_cookie)? {
            Found::Instance(config) => Some(config),
            Found::Leftovers(what) => {
                tracing::info!(directory = %options.directory.display(), "removing what is left of {what}");
                pins.remove()?;
                None
            }
            Found::Nothing => None,
        };
        // Before anything is made: what does not fit leaves no trace.
        let tables = match found {
            Some(_) => Connections::open(&pins)?.tables(),
            None => Tables::new(options.max_connections, options.memory)?,
        };
        pins.create()?;
        let hz = found.map_or(LIKELY_HZ, |config| config.hz);
        let programs = Programs::load(&pins, hz, tables, options.picks_at_once)?;
        let (mut programs, config) = match found {
            Some(config) => (programs, config),
            None => make_instance(&pins, programs, options, tables)?,
        };
        // Every interface gets it. Better no daemon than one that the kernel refuses the programs of.
        programs.tc()?;
        // Before anything is attached: until then a program lets every packet pass.
        let services = Services::open(&pins, programs.take_destinations()?)?;
        let connections = Connections::open(&pins)?;
        let Tables { max_connections, memory } = tables;
        if let Some(asked) = options.max_connections
            && asked != max_connections
        {
            tracing::warn!(
                "the connection tables keep the size that they were made with, {max_connections}, instead of {asked}, because they are at \
                 work; `bpfvs stop --detach` and a new start change it, and lose all connections"
            );
        }
        if let Some(asked) = options.memory
            && asked != memory
        {
            tracing::warn!(
                "the connection tables take their memory {memory}, as they were made to, instead of {asked}, because they are at work; \
                 `bpfvs stop --detach` and a new start change it, and lose all connections"
            );
        }
        let mut demand = Demand::default();
        for (id, _) in services.iter() {
            demand.add(id);
        }
        let words = |name| Words::open(&pins.map(name));
        let (orders, received) = mpsc::unbounded_channel();
        let (answers, answered) = watch::channel(0);
        Ok(Self {
            adopted: found.is_some(),
            config,
            config_map: pins.typed("CONFIG")?,
            runs: Runs::new(words("SCHEDULES")?, words("FLOODS")?, words("CURSORS")?, words("RUNS")?),
            standings: Standings::new(words("STANDINGS")?),
            destinations: Destinations::open(&pins)?,
            templates: Templates::open(&pins)?,
            locals: Locals::open(&pins)?,
            counters: words("COUNTERS")?,
            peaks: words("PEAKS")?,
            flood: Flood::open(&pins)?,
            bell: None,
            swept: words("SWEPT")?,
            statistics: pins.typed("STATISTICS")?,
            servers: Arc::new(Mutex::new(Servers::open(&pins, programs.take_sources()?)?)),
            attachments: Arc::new(Mutex::new(Attachments::new(
                programs,
                pins.clone(),
                options.hook,
                options.tcx,
                &options.interfaces,
            ))),
            mark_device: Arc::default(),
            demand: Arc::new(Mutex::new(demand)),
            sweeper: Arc::new(Mutex::new(Sweeper::open(&pins)?)),
            swept_report: Arc::new(pins.typed("SWEEP")?),
            teller: Arc::new(Mutex::new(Teller::open(&pins)?)),
            successor: Successor::open(&pins)?,
            reasons: Reasons::open(&pins)?,
            services,
            connections,
            orders,
            asked: 0,
            answered,
            task: Some((received, answers)),
            pins,
        })
    }

    /// Attaches to the interfaces and begins to follow netlink, in this thread's network namespace, on this runtime.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        let Some((orders, answered)) = self.task.take() else { return Ok(()) };
        self.bell = Some(Bell::open(&self.pins)?);
        let devices = Devices::open(&self.pins)?;
        let (servers, attachments) = (Arc::clone(&self.servers), Arc::clone(&self.attachments));
        let (device, demand) = (Arc::clone(&self.mark_device), Arc::clone(&self.demand));
        let guard = Guard { device, demand, detours: Detours::open(&self.pins)? };
        let resolver = Resolver::start(orders, answered, servers, attachments, devices, guard).await?;
        tokio::spawn(resolver.run());
        // Even if nobody needs it: the last daemon may not have come to take the mark device away.
        self.order(Order::KeepMarkDevice);
        Ok(())
    }

    /// Whether an earlier daemon's instance was taken over.
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// The directory of the pins.
    pub fn directory(&self) -> &std::path::Path {
        self.pins.directory()
    }

    /// Connections that fit into each table.
    pub const fn max_connections(&self) -> u32 {
        self.connections.tables().max_connections
    }

    /// When the tables take the memory for their entries.
    pub const fn memory(&self) -> TableMemory {
        self.connections.tables().memory
    }

    /// The services as they stand in the map, whoever wrote them.
    pub fn service_entries(&self) -> Vec<(ServiceId, Service)> {
        self.services.iter().map(|(id, service)| (*id, *service)).collect()
    }

    /// The real servers as they stand in the map, whoever wrote them.
    pub fn server_entries(&self) -> Result<Vec<(u32, Server)>, Error> {
        lock(&self.servers).in_use()
    }

    /// The entries of a real server as the packet path reads them.
    pub fn server_entry(&self, index: u32) -> Result<(Server, NextHop), Error> {
        let servers = lock(&self.servers);
        Ok((servers.entry(index)?, servers.next_hop(index)?))
    }

    /// Whether packets to this address are looked at.
    pub fn filter_contains(&self, address: IpAddr) -> bool {
        self.services.filter_contains(address)
    }

    /// How the mark device is.
    pub fn mark_device(&self) -> MarkDevice {
        lock(&self.mark_device).clone()
    }

    /// The settings as they stand in the map.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Attaches to an interface.
    pub fn attach(&self, interface: &str, hook: Hook) -> anyhow::Result<()> {
        lock(&self.attachments).attach(interface, hook)
    }

    /// Detaches from an interface.
    pub fn detach(&self, interface: &str) -> anyhow::Result<()> {
        lock(&self.attachments).detach(interface)
    }

    /// The interfaces that are attached to.
    pub fn interfaces(&self) -> Vec<InterfaceView> {
        lock(&self.attachments).interfaces()
    }

    /// How many instructions the verifier walked through for each program.
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        lock(&self.attachments).verified_instructions()
    }

    /// Resolves when the way to every server that was made known so far has been looked for once.
    pub fn settled(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut answered = self.answered.clone();
        let asked = self.asked;
        async move {
            // An error means that the task is gone, and nothing will ever be more settled.
            let _ = answered.wait_for(|count| *count >= asked).await;
        }
    }

    /// Resolves when connections have come, gone or changed their state since this was called.
    pub fn changed(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let changed = self.bell.as_mut().map(Bell::listen);
        async move {
            match changed {
                Some(changed) => changed.await,
                None => std::future::pending().await,
            }
        }
    }

    /// Runs the sweep on a thread of its own.
    pub fn sweep(&self) -> impl Future<Output = anyhow::Result<SweepOutcome>> + Send + use<> {
        let sweeper = Arc::clone(&self.sweeper);
        async move { tokio::task::spawn_blocking(move || lock(&sweeper).run()).await.context("the sweep broke off")? }
    }

    /// All connections and templates, to be shown one after the other.
    pub fn listing(&self) -> anyhow::Result<Listing> {
        Listing::open(&self.pins, Arc::clone(&self.servers), self.config, self.clock()?)
    }

    /// Finds what a master has to tell others of, on a thread of its own.
    pub fn tell(&self, changes: Arc<Mutex<Changes>>) -> impl Future<Output = anyhow::Result<Told>> + Send + use<> {
        let (teller, report, config) = (Arc::clone(&self.teller), Arc::clone(&self.swept_report), self.config);
        let walk = move || {
            let clock = Clock::read(&report_of(&report)?, config.hz)?;
            lock(&teller).walk(&config, clock, &mut lock(&changes))
        };
        async move { tokio::task::spawn_blocking(walk).await.context("the walk through the connections broke off")? }
    }

    /// Takes over what a master tells.
    pub fn take_over(&mut self, entry: &Entry, place: Place) -> Result<(), LeftOut> {
        let clock = self.clock().map_err(|_| LeftOut::Kernel)?;
        let servers = lock(&self.servers);
        let server = |index| servers.entry(index).ok().filter(|entry| entry.status != Status::Free as u8);
        self.successor.take_over(entry, place, &Surroundings { config: &self.config, clock, server: &server })
    }

    fn clock(&self) -> anyhow::Result<Clock> {
        Clock::read(&report_of(&self.swept_report)?, self.config.hz)
    }

    /// Finds how much of each local address is in use, on a thread of its own.
    pub fn local_usage(&self) -> impl Future<Output = anyhow::Result<HashMap<IpAddr, LocalUsage>>> + Send + use<> {
        let connections = Connections::open(&self.pins);
        let (servers, locals) = (Arc::clone(&self.servers), self.locals.addresses().to_vec());
        let count = move || connections?.local_usage(&mut listing::known_servers(servers), &locals);
        async move { tokio::task::spawn_blocking(count).await.context("the walk through the connections broke off")? }
    }

    /// How flood mode is.
    pub fn flood(&self) -> anyhow::Result<FloodView> {
        self.flood.view(&self.config, &report_of(&self.swept_report)?)
    }

    /// All reason counters.
    pub fn reasons(&self) -> anyhow::Result<Vec<ReasonView>> {
        self.reasons.list()
    }

    /// Detaches from every interface, lets go of all neighbours and removes all pins. Connections are lost.
    pub async fn shut_down(&mut self) -> anyhow::Result<()> {
        lock(&self.attachments).detach_all()?;
        if self.task.is_none() {
            let (done, released) = oneshot::channel();
            if self.orders.send(Order::Release(done)).is_ok() {
                let _ = released.await;
            }
        }
        self.pins.remove()
    }

    /// Removes an instance that no daemon serves: detaches its programs from this thread's network namespace and removes
    /// its pins.
    pub async fn remove(directory: impl Into<PathBuf>) -> anyhow::Result<()> {
        let pins = Pins::new(directory);
        let (connection, handle, _) = rtnetlink::new_connection().context("a netlink socket cannot be opened")?;
        let task = tokio::spawn(connection);
        mark_device::remove(&handle).await?;
        if !Attachments::kernel_has_tcx() {
            let links = links::list(&handle).await.context("the network devices cannot be listed")?;
            for link in links.values() {
                remove_filter(&link.name);
            }
        }
        task.abort();
        pins.remove()
    }

    fn look(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.order(Order::Look(address));
        }
    }

    fn order(&mut self, order: Order) {
        // The task can only be gone if the runtime is, and then nobody waits.
        if self.orders.send(order).is_ok() {
            self.asked += 1;
        }
    }

    /// Changes what the mark device is for; the resolver is told if that matters to it.
    fn demand(&mut self, change: impl FnOnce(&mut Demand) -> bool) {
        let matters = change(&mut lock(&self.demand));
        if matters {
            self.order(Order::KeepMarkDevice);
        }
    }
}

impl Datapath for KernelDatapath {
    fn service_capacity(&self) -> u32 {
        self.runs.capacity()
    }

    fn server_capacity(&self) -> u32 {
        lock(&self.servers).capacity()
    }

    fn set_service(&mut self, id: &ServiceId, service: Service) -> Result<(), Error> {
        if service.flags & service_flags::SIP != 0 {
            lock(&self.attachments)
                .read_sip()
                .map_err(|error| kernel_error("the programs for SIP cannot be loaded".to_owned(), format!("{error:#}")))?;
        }
        self.services.set(id, service)?;
        self.demand(|demand| demand.add(id));
        Ok(())
    }

    fn remove_service(&mut self, id: &ServiceId) -> Result<(), Error> {
        if let Some(service) = self.services.remove(id)?
            && !self.services.has_index(service.id)
        {
            self.runs.withdraw(service.id);
        }
        self.demand(|demand| demand.remove(id));
        Ok(())
    }

    fn set_mark_rules(&mut self, rules: &[MarkRule]) -> Result<(), Error> {
        self.services.set_rules(rules)?;
        self.demand(|demand| demand.set_rules(rules));
        Ok(())
    }

    fn publish(&mut self, service: u32, run: &Run) -> Result<(), Error> {
        if let Some(locality) = &run.locality {
            self.standings.publish(service, locality);
        } else if self.standings.withdraw(service)
            && let Err(error) = self.destinations.forget_service(service)
        {
            tracing::warn!(service, "destinations stay for now: {error:#}");
        }
        self.runs.publish(service, run)
    }

    fn publish_flood(&mut self, service: u32, picks: &[u32]) -> Result<(), Error> {
        self.runs.publish_flood(service, picks)
    }

    fn cursor(&self, service: u32) -> u32 {
        self.runs.cursor(service)
    }

    fn clock_rate(&self) -> u32 {
        self.config.hz
    }

    fn set_server(&mut self, index: u32, target: &Target) -> Result<(), Error> {
        if matches!(target.method, Method::Masquerade | Method::FullNat { .. }) {
            let mut attachments = lock(&self.attachments);
            let loaded = if target.crosses() { attachments.cross() } else { attachments.translate() };
            loaded
                .map_err(|error| kernel_error("the programs for masquerading cannot be loaded".to_owned(), format!("{error:#}")))?;
            warn_unless_forwarding(target);
        }
        let concerned = lock(&self.servers).set(index, *target)?;
        self.look(concerned);
        Ok(())
    }

    fn write_servers(&mut self) -> Result<(), Error> {
        lock(&self.servers).write()
    }

    fn retire_server(&mut self, index: u32) -> Result<(), Error> {
        let concerned = lock(&self.servers).retire(index)?;
        self.look(concerned);
        Ok(())
    }

    fn free_server(&mut self, index: u32) -> Result<(), Error> {
        let concerned = lock(&self.servers).free(index)?;
        self.look(concerned);
        self.standings.free(index);
        self.templates.free(index)?;
        self.counters.store(index, 0);
        self.swept.store(index, 0);
        let cpus = aya::util::nr_cpus().map_err(|(file, error)| kernel_error(format!("{file} cannot be read"), error))?;
        let zeros = PerCpuValues::try_from(vec![Statistics::default(); cpus])
            .map_err(|error| kernel_error("the number of CPUs is in doubt", error))?;
        self.statistics
            .set(index, zeros, 0)
            .map_err(|error| kernel_error(format!("the statistics of real server {index} cannot be set to zero"), error))
    }

    fn set_scope(&mut self, index: u32, scope: Scope) -> Result<(), Error> {
        self.templates.set_scope(index, scope)
    }

    fn templates(&self, index: u32) -> u32 {
        self.templates.count(index)
    }

    fn flush_templates(&mut self, service: Option<&ServiceId>) -> Result<(), Error> {
        self.templates.flush(service).map_err(|error| kernel_error("not all templates are deleted", format!("{error:#}")))
    }

    fn reachability(&self, index: u32) -> Status {
        lock(&self.servers).status(index)
    }

    fn counters(&self, index: u32) -> Counters {
        Counters::from_word(self.counters.load(index))
    }

    fn take_peak(&self, index: u32) -> u32 {
        self.peaks.take(index) as u32
    }

    fn statistics(&self, index: u32) -> Result<Statistics, Error> {
        let values = self
            .statistics
            .get(&index, 0)
            .map_err(|error| kernel_error(format!("the statistics of real server {index} cannot be read"), error))?;
        Ok(values.iter().fold(Statistics::default(), |sum, value| Statistics {
            connections: sum.connections + value.connections,
            packets_in: sum.packets_in + value.packets_in,
            bytes_in: sum.bytes_in + value.bytes_in,
            packets_out: sum.packets_out + value.packets_out,
            bytes_out: sum.bytes_out + value.bytes_out,
        }))
    }

    fn services(&self) -> Result<Vec<ServiceId>, Error> {
        Ok(self.services.iter().map(|(id, _)| *id).collect())
    }

    fn servers(&self) -> Result<Vec<u32>, Error> {
        Ok(self.server_entries()?.into_iter().map(|(index, _)| index).collect())
    }

    fn set_pool(&mut self, pool: u32, addresses: &[IpAddr]) -> Result<(), Error> {
        self.locals.set_pool(pool, addresses)
    }

    fn pools(&self) -> Result<Vec<u32>, Error> {
        self.locals.pools()
    }

    fn clean_destinations(&mut self) {
        if self.standings.is_empty() {
            return;
        }
        let replicas: HashSet<u32> = self
            .services
            .iter()
            .filter(|(_, service)| service.mode == Mode::Replicas as u8)
            .map(|(_, service)| service.id)
            .collect();
        let mode = |service| {
            let mode = if replicas.contains(&service) { Mode::Replicas } else { Mode::Locality };
            self.standings.contains(service).then_some(mode)
        };
        if let Err(error) = self.destinations.clean(&self.config, mode) {
            tracing::warn!("destinations do not expire: {error:#}");
        }
    }

    /// The layout, the namespace's cookie and the clock rate are the datapath's own and stay as they are.
    fn configure(&mut self, config: &Config) -> Result<(), Error> {
        let config = Config { layout: LAYOUT, netns_cookie: self.config.netns_cookie, hz: self.config.hz, ..*config };
        self.config_map.set(0, config, 0).map_err(|error| kernel_error("the settings cannot be written", error))?;
        self.config = config;
        Ok(())
    }
}

/// Says what to set if the kernel tells nobody the way back to a client.
fn warn_unless_forwarding(target: &Target) {
    let setting = if target.clients == Family::Ipv6 { "net/ipv6/conf/all/forwarding" } else { "net/ipv4/ip_forward" };
    if std::fs::read_to_string(format!("/proc/sys/{setting}")).is_ok_and(|value| value.trim() == "0") {
        let setting = setting.replace('/', ".");
        tracing::warn!(
            "replies of the masqueraded real server {} will not be forwarded: this host is no router; set {setting}=1",
            target.address
        );
    }
}

/// Finds the clock rate, loads the programs for it, and writes the settings, which makes the instance one that can be
/// taken over.
fn make_instance(pins: &Pins, mut programs: Programs, options: &Options, tables: Tables) -> anyhow::Result<(Programs, Config)> {
    let hz = detect_hz(&Sweeper::open(pins)?)?;
    if hz != LIKELY_HZ {
        tracing::debug!(hz, "loading the programs again for this clock rate");
        programs = Programs::load(pins, hz, tables, options.picks_at_once)?;
    }
    let config = Config { netns_cookie: options.netns_cookie, hz, ..Config::DEFAULT };
    let mut map: Array<MapData, Config> = pins.typed("CONFIG")?;
    map.set(0, config, 0).context("the settings cannot be written")?;
    Ok((programs, config))
}

/// What the sweep's report says.
fn report_of(report: &Array<MapData, SweepReport>) -> anyhow::Result<SweepReport> {
    report.get(&0, 0).context("the report of the sweep cannot be read")
}

/// The tables must still be empty: the programs were loaded with a guess.
fn detect_hz(sweeper: &Sweeper) -> anyhow::Result<u32> {
    let earlier = sweeper.begin()?;
    if let Some(rate) = hz::from_start(&earlier) {
        return Ok(rate);
    }
    thread::sleep(Duration::from_millis(200));
    hz::from_two(&earlier, &sweeper.begin()?)
        .ok_or_else(|| anyhow!("the kernel's clocks stand still, so its tick rate cannot be found; start bpfvs again"))
}
