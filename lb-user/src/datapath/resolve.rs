//! Finds the way to every real server, and keeps it true.
//!
//! The kernel's routing and neighbour tables know all that forwarding needs; asking them for each packet would cost more
//! than forwarding. So the resolver asks once per address (`RTM_GETROUTE`, then the next hop's neighbour), has the
//! kernel keep the neighbour resolved (`NTF_EXT_MANAGED`), and listens to netlink for whatever changes the answer:
//!
//! | event | what it does |
//! | --- | --- |
//! | neighbour | the addresses behind this next hop get its MAC address, or lose it |
//! | device | interfaces are attached or forgotten; all ways are asked for anew |
//! | address, route, rule | all ways are asked for anew |
//! | link, route or rule of the mark device | the mark device is made whole again ([`mark_device`]) |
//! | lost events | everything is asked for anew |
//! | a router's report that a tunnel is too wide | the way gets narrower for ten minutes ([`path_mtu`]) |
//!
//! "Anew" waits until a storm of events is over ([`QUIET`]), but not longer than [`PATIENCE`]. Until a way is known the
//! server has no route; while the next hop's MAC address is unknown, tc lets the kernel's neighbour code send.
//!
//! The resolver is one task. It decides nothing about servers: ways go to [`Servers`], devices to [`Attachments`].

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _};
use lb_common::hop::KEEP_VLAN;
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia},
    },
    sys::AsyncSocket as _,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use super::{
    attach::Attachments,
    detour::Demand,
    devices::Devices,
    links::{self, Link, Links},
    mark_device::{self, ENTRANCE, Guard, MarkDevice, Marks},
    path_mtu::{self, Report, Reports},
    servers::Servers,
    way::{Hop, Way},
};
use crate::director::model::Family;

/// How many orders are carried out before events are heard again.
const ORDERS: usize = 256;

/// How long it must be quiet before all ways are asked for anew.
const QUIET: Duration = Duration::from_millis(20);
/// How long a storm of events may put that off.
const PATIENCE: Duration = Duration::from_millis(200);
/// When to ask again after netlink itself failed.
const RETRY: Duration = Duration::from_secs(1);
/// Room for events that were not read yet.
const RECEIVE_BUFFER: usize = 4 << 20;

/// What the datapath asks of the resolver.
#[derive(Debug)]
pub enum Order {
    /// A server has come to this address, or has left it.
    Look(IpAddr),
    /// What the mark device is for has changed.
    KeepMarkDevice,
    /// The datapath goes away: let go of all neighbours, and of the mark device.
    Release(oneshot::Sender<()>),
}

type Events = Pin<Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Sync>>;

/// A neighbour that servers need: device and address.
type NeighbourKey = (u32, IpAddr);

/// What is known of a neighbour.
#[derive(Debug, Default)]
struct Neighbour {
    mac: Option<[u8; 6]>,
    /// Whether we told the kernel to keep it resolved.
    managed: bool,
    /// The addresses whose way leads over it.
    users: BTreeSet<IpAddr>,
}

/// The answer to "what is the way to this address", before devices and neighbours are looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Route {
    None,
    Local,
    Via { ifindex: u32, next_hop: IpAddr, preferred_source: Option<IpAddr>, mtu: Option<u32> },
}

/// The task's state.
pub struct Resolver {
    handle: Handle,
    events: Events,
    orders: mpsc::UnboundedReceiver<Order>,
    answered: watch::Sender<u64>,
    servers: Arc<Mutex<Servers>>,
    attachments: Arc<Mutex<Attachments>>,
    devices: Devices,
    links: Links,
    routes: HashMap<IpAddr, Route>,
    neighbours: HashMap<NeighbourKey, Neighbour>,
    guard: Guard,
    /// When to see next whether this host forwards, which no event tells.
    next_look: Instant,
    reports: Reports,
    /// What routers reported: the MTU, and until when it counts.
    narrow: HashMap<IpAddr, (u32, Instant)>,
}

impl Resolver {
    /// Opens netlink in this thread's network namespace, lists the devices and attaches to those that are wanted.
    ///
    /// `answered` counts the orders that were carried out.
    pub async fn start(
        orders: mpsc::UnboundedReceiver<Order>,
        answered: watch::Sender<u64>,
        servers: Arc<Mutex<Servers>>,
        attachments: Arc<Mutex<Attachments>>,
        mut devices: Devices,
        guard: Guard,
    ) -> anyhow::Result<Self> {
        let (connection, handle, _) = new_connection().context("a netlink socket cannot be opened")?;
        tokio::spawn(connection);
        // Listen first, ask afterwards: what changes in between is heard.
        let (mut connection, _, events) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ])
        .context("netlink's events cannot be subscribed to")?;
        if let Err(error) = connection.socket_mut().socket_mut().set_rx_buf_sz(RECEIVE_BUFFER) {
            tracing::debug!(%error, "netlink keeps its small receive buffer");
        }
        tokio::spawn(connection);
        let links = links::list(&handle).await.context("the network devices cannot be listed")?;
        devices.learn(&links)?;
        lock(&attachments).begin(&links)?;
        Ok(Self {
            handle,
            events: Box::pin(events.map(|(message, _)| message)),
            orders,
            answered,
            servers,
            attachments,
            devices,
            links,
            routes: HashMap::new(),
            neighbours: HashMap::new(),
            guard,
            next_look: Instant::now(),
            reports: Reports::listen(),
            narrow: HashMap::new(),
        })
    }

    /// Carries out orders and follows events until the datapath is gone.
    pub async fn run(mut self) {
        // When the first event of a storm came, and when to act on it.
        let mut storm: Option<(Instant, Instant)> = None;
        let mut orders = Vec::new();
        loop {
            let due = storm.map_or_else(Instant::now, |(_, due)| due);
            let wider = self.narrow.values().map(|(_, until)| *until).min();
            let concerns_all = tokio::select! {
                biased;
                () = sleep_until(due), if storm.is_some() => {
                    storm = None;
                    if !self.look_at_all().await {
                        storm = Some((Instant::now(), Instant::now() + RETRY));
                    }
                    false
                }
                () = sleep_until(wider.unwrap_or_else(Instant::now)), if wider.is_some() => {
                    self.widen();
                    false
                }
                () = sleep_until(self.next_look), if lock(&self.guard.device).present => {
                    self.next_look = Instant::now() + RETRY;
                    self.look_at_forwarding().await;
                    false
                }
                report = self.reports.next() => {
                    self.narrow(report);
                    false
                }
                count = self.orders.recv_many(&mut orders, ORDERS) => {
                    if count == 0 {
                        return;
                    }
                    match self.obey(orders.drain(..)).await {
                        Some(understood) => !understood,
                        None => return,
                    }
                }
                event = self.events.next() => match event {
                    None => {
                        tracing::error!("netlink closed its event socket: ways to real servers are not followed any more; restart bpfvs");
                        std::future::pending::<()>().await;
                        return;
                    }
                    Some(event) => self.hear(event).await,
                },
            };
            if concerns_all {
                let now = Instant::now();
                let first = storm.map_or(now, |(first, _)| first);
                storm = Some((first, (now + QUIET).min(first + PATIENCE)));
            }
        }
    }

    /// Believes a router that a tunnel is too wide, if it is ours and was wider.
    fn narrow(&mut self, Report { address, mtu }: Report) {
        let Some(route) = self.routes.get(&address) else { return };
        if let Way::Through(hop) = self.way(address, *route)
            && mtu < hop.mtu
        {
            tracing::info!(%address, mtu, "a router reports a narrower way to a real server");
            self.narrow.insert(address, (mtu, Instant::now() + path_mtu::LIFETIME));
            self.teach([address]);
        }
    }

    /// Forgets reports whose time is over.
    fn widen(&mut self) {
        let now = Instant::now();
        let over: Vec<_> = self.narrow.iter().filter(|(_, (_, until))| *until <= now).map(|(address, _)| *address).collect();
        for address in &over {
            self.narrow.remove(address);
        }
        self.teach(over);
    }

    /// Carries orders out. Says whether all was understood; nothing if the last order was to let go.
    async fn obey(&mut self, orders: impl Iterator<Item = Order>) -> Option<bool> {
        let mut understood = true;
        let (mut asked, mut keep_mark_device) = (0, false);
        // Thousands of services may have the same real servers, and come at one go.
        let mut looked = HashSet::new();
        for order in orders {
            match order {
                Order::Look(address) => {
                    if looked.insert(address) {
                        understood &= self.look(address).await;
                    }
                    asked += 1;
                }
                Order::KeepMarkDevice => {
                    keep_mark_device = true;
                    asked += 1;
                }
                Order::Release(done) => {
                    self.release_all().await;
                    *lock(&self.guard.demand) = Demand::default();
                    self.keep_mark_device().await;
                    // Nobody may wait for it any more.
                    let _ = done.send(());
                    return None;
                }
            }
        }
        self.teach(looked);
        // Once for all: thousands of services may come at one go.
        if keep_mark_device {
            understood &= self.keep_mark_device().await;
        }
        self.answered.send_modify(|count| *count += asked);
        Some(understood)
    }

    /// Reads an event. `true` if all ways must be asked for anew.
    async fn hear(&mut self, event: NetlinkMessage<RouteNetlinkMessage>) -> bool {
        use RouteNetlinkMessage as M;
        match event.payload {
            NetlinkPayload::Overrun(_) => {
                tracing::warn!("netlink events were lost; asking for everything anew");
                self.resynchronize().await;
                true
            }
            NetlinkPayload::InnerMessage(M::NewLink(message)) => Link::parse(&message).is_some_and(|link| self.link_appeared(link)),
            NetlinkPayload::InnerMessage(M::DelLink(message)) => {
                Link::parse(&message).is_some_and(|link| self.link_vanished(link.index))
            }
            NetlinkPayload::InnerMessage(M::NewNeighbour(message)) => {
                self.neighbour_changed(&message, false);
                false
            }
            NetlinkPayload::InnerMessage(M::DelNeighbour(message)) => self.neighbour_changed(&message, true),
            NetlinkPayload::InnerMessage(M::DelRoute(message)) => {
                self.guard.detours.route_vanished(&message);
                true
            }
            NetlinkPayload::InnerMessage(M::DelAddress(message)) => {
                self.forget_routes(message.header.index);
                true
            }
            NetlinkPayload::InnerMessage(M::NewAddress(_) | M::NewRoute(_) | M::NewRule(_) | M::DelRule(_)) => true,
            _ => false,
        }
    }

    fn link_appeared(&mut self, link: Link) -> bool {
        lock(&self.attachments).follow(&link);
        let index = link.index;
        let old = self.links.insert(index, link);
        let changed = old.as_ref() != self.links.get(&index);
        if changed {
            self.forget_routes(index);
            self.learn_devices();
        }
        changed
    }

    fn link_vanished(&mut self, index: u32) -> bool {
        lock(&self.attachments).gone(index);
        self.forget_routes(index);
        let known = self.links.remove(&index).is_some();
        if known {
            self.learn_devices();
        }
        known
    }

    /// The routes into the mark device go without a word if its entrance goes or goes down, or loses its address.
    fn forget_routes(&mut self, index: u32) {
        if self.links.get(&index).is_some_and(|link| link.name == ENTRANCE) {
            self.guard.detours.forget_routes();
        }
    }

    fn learn_devices(&mut self) {
        if let Err(error) = self.devices.learn(&self.links) {
            tracing::warn!(%error, "replies of masqueraded real servers leave by tc where XDP could send them");
        }
    }

    /// Asks for all devices and all neighbours again.
    async fn resynchronize(&mut self) {
        self.guard.detours.forget_routes();
        match links::list(&self.handle).await {
            Ok(links) => {
                let gone: Vec<_> = self.links.keys().filter(|index| !links.contains_key(index)).copied().collect();
                for index in gone {
                    self.link_vanished(index);
                }
                for link in links.into_values() {
                    self.link_appeared(link);
                }
            }
            Err(error) => tracing::warn!(%error, "the network devices cannot be listed"),
        }
        let keys: Vec<_> = self.neighbours.keys().copied().collect();
        for key in keys {
            let found = self.ask_neighbour(key).await;
            if let Some(neighbour) = self.neighbours.get_mut(&key) {
                neighbour.mac = found.as_ref().and_then(mac_of);
            }
        }
    }

    /// Asks for every way anew. `false` if netlink failed and it should be tried again.
    async fn look_at_all(&mut self) -> bool {
        let addresses = lock(&self.servers).addresses();
        let mut understood = !lock(&self.guard.device).present || self.keep_mark_device().await;
        for address in &addresses {
            understood &= self.look(*address).await;
        }
        self.teach(addresses);
        understood
    }

    /// Sees that the mark device is there as long as there are mark services, and gone afterwards. `false` if it should be
    /// tried again.
    async fn keep_mark_device(&mut self) -> bool {
        let marks = lock(&self.guard.demand).marks().clone();
        let outcome = self.try_to_keep_mark_device(&marks).await;
        let obstacle = match &outcome {
            Ok(_) => mark_device::obstacles(&marks),
            Err(error) => Some(format!("{error:#}")),
        };
        if outcome.is_err()
            && let Err(error) = self.guard.detours.close(&BTreeSet::new())
        {
            tracing::error!("{error:#}");
        }
        let now = MarkDevice { present: !marks.is_empty(), detour: outcome.as_ref().is_ok_and(|detour| *detour), obstacle };
        let before = std::mem::replace(&mut *lock(&self.guard.device), now.clone());
        if now.detour && !before.detour {
            tracing::info!(
                "new connections of services by address wait for marks, which cost them a detour; `bpfvs mark import` ends that"
            );
        }
        if let Some(obstacle) = now.obstacle.filter(|obstacle| before.obstacle.as_ref() != Some(obstacle)) {
            tracing::warn!("{obstacle}");
        }
        outcome.is_ok()
    }

    /// Says whether services by address wait for marks.
    async fn try_to_keep_mark_device(&mut self, marks: &Marks) -> anyhow::Result<bool> {
        if marks.is_empty() {
            self.guard.detours.close(&BTreeSet::new())?;
            self.guard.detours.forget_routes();
            mark_device::remove(&self.handle).await?;
            return Ok(false);
        }
        let ends = mark_device::keep(&self.handle, &self.links).await?;
        for end in ends.clone() {
            // Our program must wait there before the first packet comes.
            self.link_appeared(end);
        }
        let [entrance, exit] = ends;
        let is_attached = lock(&self.attachments).interfaces().iter().any(|interface| interface.index == exit.index);
        let families = |demand: &Demand| {
            Family::ALL
                .into_iter()
                .filter(|family| is_attached && demand.waits(*family) && mark_device::forwards(*family))
                .collect()
        };
        let (families, detour) = {
            let demand = lock(&self.guard.demand);
            let families: BTreeSet<Family> = families(&demand);
            let detour = demand.detour(&families);
            (families, detour)
        };
        let Guard { detours, .. } = &mut self.guard;
        // No packet waits before it would come back, nor any longer.
        detours.close(&families)?;
        detours.add(&self.handle, entrance.index, &detour).await?;
        mark_device::lead(&self.handle, &entrance, marks, &detour.rules).await?;
        detours.remove(&self.handle, entrance.index, &detour).await?;
        detours.open_to(exit.index, &families)?;
        Ok(!detour.rules.is_empty())
    }

    /// Sees whether this host forwards as it did.
    async fn look_at_forwarding(&mut self) {
        let obstacle = mark_device::obstacles(lock(&self.guard.demand).marks());
        if obstacle != lock(&self.guard.device).obstacle {
            self.keep_mark_device().await;
        }
    }

    /// Asks for the way to an address, or forgets it if no server has it any more; to be taught afterwards. `false` if netlink
    /// failed.
    async fn look(&mut self, address: IpAddr) -> bool {
        if !lock(&self.servers).wants(address) {
            if let Some(Route::Via { ifindex, next_hop, .. }) = self.routes.remove(&address) {
                self.leave_neighbour((ifindex, next_hop), address).await;
            }
            return true;
        }
        let (route, understood) = match self.ask_route(address).await {
            Ok(route) => (route, true),
            Err(error) => {
                tracing::warn!(%address, %error, "the kernel does not tell the way to a real server; trying again");
                (self.routes.get(&address).copied().unwrap_or(Route::None), false)
            }
        };
        let old = self.routes.insert(address, route);
        let key = neighbour_key(route);
        if let Some(key) = key {
            self.enter_neighbour(key, address).await;
        }
        if let Some(old) = old.and_then(neighbour_key)
            && Some(old) != key
        {
            self.leave_neighbour(old, address).await;
        }
        understood
    }

    /// Hands what is known about addresses to the servers, and to the kernel.
    fn teach(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut servers = lock(&self.servers);
        for address in addresses {
            let Some(route) = self.routes.get(&address) else { continue };
            if let Err(error) = servers.learn(address, self.way(address, *route)) {
                tracing::error!(%address, %error, "the way to a real server cannot be told to the kernel");
            }
        }
        if let Err(error) = servers.write() {
            tracing::error!(%error, "ways to real servers cannot be told to the kernel");
        }
    }

    /// Joins a route with its device and neighbour.
    fn way(&self, address: IpAddr, route: Route) -> Way {
        let Route::Via { ifindex, next_hop, preferred_source, mtu } = route else {
            return if route == Route::Local { Way::Local } else { Way::NoRoute };
        };
        let Some(link) = self.links.get(&ifindex) else { return Way::NoRoute };
        let reported = self.narrow.get(&address).map_or(u32::MAX, |(mtu, _)| *mtu);
        let mut hop = Hop {
            ifindex,
            port_ifindex: ifindex,
            vlan: KEEP_VLAN,
            mtu: mtu.unwrap_or(link.mtu).min(link.mtu).min(reported),
            source: link.mac.unwrap_or_default(),
            next_hop,
            mac: link.mac.and_then(|_| self.neighbours.get(&(ifindex, next_hop))?.mac),
            preferred_source,
            redirects: link.redirects,
        };
        match links::port(&self.links, link) {
            Some((port_ifindex, vlan)) => {
                (hop.port_ifindex, hop.vlan) = (port_ifindex, vlan);
                hop.redirects = self.links.get(&port_ifindex).is_some_and(|port| port.redirects);
            }
            // Only the kernel's own VLAN code can send.
            None => hop.mac = None,
        }
        Way::Through(hop)
    }

    /// Asks the kernel for the route to an address.
    async fn ask_route(&self, address: IpAddr) -> Result<Route, rtnetlink::Error> {
        let message = match address {
            IpAddr::V4(address) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(address, 32).build(),
            IpAddr::V6(address) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(address, 128).build(),
        };
        let mut message = message;
        // The builder is for adding routes; a question has no table, type, scope or protocol.
        message.header = RouteHeader {
            address_family: message.header.address_family,
            destination_prefix_length: message.header.destination_prefix_length,
            ..Default::default()
        };
        let mut answers = Box::pin(self.handle.route().get(message).execute());
        match answers.next().await {
            Some(Ok(answer)) => Ok(read_route(address, &answer)),
            // A refusal is an answer: unreachable, prohibited, black hole.
            Some(Err(rtnetlink::Error::NetlinkError(_))) | None => Ok(Route::None),
            Some(Err(error)) => Err(error),
        }
    }

    /// Notes that the way to `address` leads over a neighbour, and has the kernel resolve it.
    async fn enter_neighbour(&mut self, key: NeighbourKey, address: IpAddr) {
        let known = self.neighbours.contains_key(&key);
        self.neighbours.entry(key).or_default().users.insert(address);
        let addressed = self.links.get(&key.0).is_some_and(|link| link.mac.is_some());
        if !addressed || known && self.neighbours[&key].managed {
            return;
        }
        let found = self.ask_neighbour(key).await;
        let fixed =
            found.as_ref().is_some_and(|found| matches!(found.header.state, NeighbourState::Permanent | NeighbourState::Noarp));
        // An entry that somebody fixed is left alone: to manage it would undo that.
        let managed = !fixed && self.manage(key).await;
        let mac = found.as_ref().and_then(mac_of);
        let neighbour = self.neighbours.entry(key).or_default();
        neighbour.managed = managed;
        neighbour.mac = mac.or(neighbour.mac);
    }

    /// Notes that the way to `address` does not lead over a neighbour any more.
    async fn leave_neighbour(&mut self, key: NeighbourKey, address: IpAddr) {
        let Some(neighbour) = self.neighbours.get_mut(&key) else { return };
        neighbour.users.remove(&address);
        if neighbour.users.is_empty() {
            let managed = neighbour.managed;
            self.neighbours.remove(&key);
            if managed {
                self.release(key).await;
            }
        }
    }

    async fn release_all(&mut self) {
        let managed: Vec<_> = self.neighbours.drain().filter(|(_, neighbour)| neighbour.managed).map(|(key, _)| key).collect();
        for key in managed {
            self.release(key).await;
        }
    }

    /// Tells the kernel to keep a neighbour resolved; on kernels before 5.16 to resolve it once.
    async fn manage(&self, key: NeighbourKey) -> bool {
        let mut request = self.handle.neighbours().add(key.0, key.1).state(NeighbourState::None).replace();
        request.message_mut().attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        let Err(error) = request.execute().await else { return true };
        tracing::debug!(address = %key.1, ifindex = key.0, %error, "the kernel does not manage this neighbour; it is resolved once");
        if let Err(error) = self.use_once(key).await {
            tracing::debug!(address = %key.1, ifindex = key.0, %error, "the neighbour cannot be resolved now");
        }
        false
    }

    /// Tells the kernel that it need not keep a neighbour resolved any more.
    async fn release(&self, key: NeighbourKey) {
        // Naming no extended flags takes "managed" away; the entry then ages like any other.
        if let Err(error) = self.use_once(key).await {
            tracing::debug!(address = %key.1, ifindex = key.0, %error, "the neighbour is gone already");
        }
    }

    async fn use_once(&self, key: NeighbourKey) -> Result<(), rtnetlink::Error> {
        self.handle.neighbours().add(key.0, key.1).state(NeighbourState::None).flags(NeighbourFlags::Use).replace().execute().await
    }

    /// Asks for one entry of the neighbour table.
    async fn ask_neighbour(&self, key: NeighbourKey) -> Option<NeighbourMessage> {
        let mut question = NeighbourMessage::default();
        question.header.ifindex = key.0;
        let (family, address) = match key.1 {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        question.header.family = family;
        question.attributes.push(NeighbourAttribute::Destination(address));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(question));
        request.header.flags = NLM_F_REQUEST;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).ok()?;
        match answers.next().await?.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => Some(message),
            _ => None,
        }
    }

    /// A neighbour has changed or is gone. `true` if servers need it and it must be asked for anew.
    fn neighbour_changed(&mut self, message: &NeighbourMessage, gone: bool) -> bool {
        let Some(address) = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        }) else {
            return false;
        };
        let Some(neighbour) = self.neighbours.get_mut(&(message.header.ifindex, address)) else { return false };
        neighbour.mac = if gone { None } else { mac_of(message) };
        if gone {
            neighbour.managed = false;
        }
        let users: Vec<_> = neighbour.users.iter().copied().collect();
        self.teach(users);
        gone
    }
}

fn neighbour_key(route: Route) -> Option<NeighbourKey> {
    match route {
        Route::Via { ifindex, next_hop, .. } => Some((ifindex, next_hop)),
        Route::None | Route::Local => None,
    }
}

/// The MAC address of a neighbour, if its state says that it may be used.
fn mac_of(message: &NeighbourMessage) -> Option<[u8; 6]> {
    use NeighbourState as S;
    if !matches!(message.header.state, S::Reachable | S::Stale | S::Delay | S::Probe | S::Permanent | S::Noarp) {
        return None;
    }
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok(),
        _ => None,
    })
}

/// Reads the answer to "what is the way to `address`".
fn read_route(address: IpAddr, answer: &RouteMessage) -> Route {
    match answer.header.kind {
        RouteType::Local => return Route::Local,
        RouteType::Unicast => {}
        _ => return Route::None,
    }
    let (mut ifindex, mut next_hop, mut preferred_source, mut mtu) = (None, address, None, None);
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(gateway) => next_hop = ip(gateway).unwrap_or(next_hop),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => next_hop = IpAddr::V4(*gateway),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => next_hop = IpAddr::V6(*gateway),
            RouteAttribute::PrefSource(source) => preferred_source = ip(source),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None });
            }
            _ => {}
        }
    }
    ifindex.map_or(Route::None, |ifindex| Route::Via { ifindex, next_hop, preferred_source, mtu })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// Locks what task and datapath share. A panic elsewhere leaves tables that are rewritten anyway, so it does not matter.
pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
