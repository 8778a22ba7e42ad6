//! The datapath as the director sees it: maps to fill, counters to read.
//!
//! [`Datapath`] is all that the director knows. The real one (maps, programs, netlink) implements it; so does a small
//! in-memory one for the director's unit tests.
//!
//! | subject | module |
//! | --- | --- |
//! | the real one | [`kernel`] |
//! | where maps are pinned, and which are taken over | [`maps`] |
//! | shared memory, what wakes its reader, raw system calls | [`shared`], [`bell`], [`system`] |
//! | how large the tables are | [`capacity`] |
//! | the programs, and the interfaces that they run on | [`programs`], [`attach`], [`links`] |
//! | services, schedules, filters | [`services`], [`runs`], [`filter`] |
//! | how marked packets come back, and those that may be marked | [`mark_device`], [`detour`] |
//! | what replies leave by | [`devices`] |
//! | destinations of lblc and lblcr | [`locality`] |
//! | templates of persistent services | [`templates`] |
//! | local addresses of FULLNAT | [`locals`] |
//! | real servers and the ways to them | [`servers`], [`way`], [`resolve`] |
//! | what other directors are told, and what they tell | [`tell`], [`take_over`] |
//! | what the kernel counts | [`sweep`], [`connections`], [`listing`], [`reasons`], [`flood`] |
//! | the kernel's clock rate | [`hz`] |

pub mod attach;
pub mod bell;
pub mod capacity;
pub mod connections;
pub mod detour;
pub mod devices;
pub mod filter;
pub mod flood;
pub mod hz;
pub mod kernel;
pub mod links;
pub mod listing;
pub mod locality;
pub mod locals;
pub mod maps;
pub mod mark_device;
pub mod path_mtu;
pub mod programs;
pub mod reasons;
pub mod resolve;
pub mod runs;
pub mod servers;
pub mod services;
pub mod shared;
pub mod sweep;
pub mod system;
pub mod take_over;
pub mod tell;
pub mod templates;
pub mod way;

use std::{fmt::Display, net::IpAddr};

pub use self::{
    kernel::{KernelDatapath, Options},
    listing::{Listing, Visit},
    system::netns_cookie,
};

use lb_common::{config::Config, server::Counters, service::Service, statistics::Statistics, template::Scope};

pub use crate::director::model::Hook;

use crate::{
    director::model::{Family, MarkRule, Method, ServiceId},
    scheduler::Run,
};

/// What the datapath keeps for the director. Indices of services and servers are the director's to choose, below the
/// capacities.
pub trait Datapath {
    /// Virtual services that fit.
    fn service_capacity(&self) -> u32;

    /// Real servers that fit.
    fn server_capacity(&self) -> u32;

    /// Makes a service known to the packet path, or changes it. Its schedule should have been published before.
    fn set_service(&mut self, id: &ServiceId, service: Service) -> Result<(), Error>;

    /// Takes a service away from the packet path.
    fn remove_service(&mut self, id: &ServiceId) -> Result<(), Error>;

    /// Gives packets firewall marks by these rules, and by no others any more.
    fn set_mark_rules(&mut self, rules: &[MarkRule]) -> Result<(), Error>;

    /// Publishes the schedule of the service with this index; a later one takes its place at once.
    fn publish(&mut self, service: u32, run: &Run) -> Result<(), Error>;

    /// Publishes the table that the service with this index has for flood mode; without picks, it has none. Does nothing where
    /// there is no such mode.
    fn publish_flood(&mut self, _service: u32, _picks: &[u32]) -> Result<(), Error> {
        Ok(())
    }

    /// Where the cursor of the service with this index stands: how many picks were taken, modulo 2^32.
    fn cursor(&self, service: u32) -> u32;

    /// Ticks of the kernel's clock in a second.
    fn clock_rate(&self) -> u32;

    /// Makes a real server known, or changes it. The datapath finds the way to it and keeps it true. The packet path may see
    /// nothing of it until [`Datapath::write_servers`].
    fn set_server(&mut self, index: u32, target: &Target) -> Result<(), Error>;

    /// Shows the packet path the real servers as they were set and retired: to be called before a schedule that names them is
    /// published.
    fn write_servers(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Marks a real server as removed: connections that name it are dropped, its counters stay. As with
    /// [`Datapath::set_server`], the packet path may see it late.
    fn retire_server(&mut self, index: u32) -> Result<(), Error>;

    /// Forgets a real server; its index may be used again, with all counters at zero.
    fn free_server(&mut self, index: u32) -> Result<(), Error>;

    /// Says how the templates of a real server's connections are found. To be said before its service is made known.
    fn set_scope(&mut self, index: u32, scope: Scope) -> Result<(), Error>;

    /// How many templates lead to a real server.
    fn templates(&self, index: u32) -> u32;

    /// Deletes the templates of a service, or of all.
    fn flush_templates(&mut self, service: Option<&ServiceId>) -> Result<(), Error>;

    /// How a real server can be reached now.
    fn reachability(&self, index: u32) -> lb_common::server::Status;

    /// The live connection counters of a real server.
    fn counters(&self, index: u32) -> Counters;

    /// How many connections a real server had in the moment when one of its own took the place of another, if there was such
    /// a moment since this was last asked; else 0.
    fn take_peak(&self, index: u32) -> u32;

    /// The traffic of a real server since it was made known, over all CPUs.
    fn statistics(&self, index: u32) -> Result<Statistics, Error>;

    /// Every service that the packet path knows, whoever made it known.
    fn services(&self) -> Result<Vec<ServiceId>, Error>;

    /// The index of every real server that is not free, whoever made it known.
    fn servers(&self) -> Result<Vec<u32>, Error>;

    /// Sets the local addresses of a pool: that of a service, or [`lb_common::local::SHARED`]. Connections keep what they have.
    fn set_pool(&mut self, pool: u32, addresses: &[IpAddr]) -> Result<(), Error>;

    /// Every pool that has addresses, whoever made it known.
    fn pools(&self) -> Result<Vec<u32>, Error>;

    /// To be called each second: forgets, when it is time to, destinations of lblc and lblcr that nobody asks for.
    fn clean_destinations(&mut self);

    /// Writes the settings.
    fn configure(&mut self, config: &Config) -> Result<(), Error>;
}

/// Where a real server is and how packets get there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Target {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// How.
    pub method: Method,
    /// Its service's pool of local addresses.
    pub pool: u32,
    /// Its service's address family: it may be another one, with a tunnel or FULLNAT.
    pub clients: Family,
}

impl Target {
    /// Whether its packets are translated between IPv6 and IPv4.
    pub fn crosses(&self) -> bool {
        matches!(self.method, Method::FullNat { .. }) && self.clients != Family::of(self.address)
    }
}

/// What can go wrong between the daemon and the kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A map has no room left.
    #[error("{what} is full: {limit} entries; {advice}")]
    Full {
        /// Which table.
        what: &'static str,
        /// Its size.
        limit: u32,
        /// What to do about it.
        advice: &'static str,
    },
    /// The kernel refused.
    #[error("{what}: {cause}")]
    Kernel {
        /// What was tried.
        what: String,
        /// What the kernel or the library said.
        cause: String,
    },
}

/// What was tried, and what the kernel or the library said.
fn kernel_error(what: impl Into<String>, cause: impl Display) -> Error {
    Error::Kernel { what: what.into(), cause: cause.to_string() }
}
