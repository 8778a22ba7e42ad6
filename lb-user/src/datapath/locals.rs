//! Local addresses, as the packet path has them: addresses by index, and pools of indices.
//!
//! An address keeps its index for as long as the instance lives, also when it leaves its pools: connections go on naming it, and
//! when it comes back it has the same one. There are as many indices as addresses that an instance will ever see.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use anyhow::Context as _;
use aya::maps::{Array, HashMap as MapHashMap, MapData};
use lb_common::{
    family::{AF_INET, AF_INET6},
    local::{LocalAddress, POOL_SIZE, Pool, PoolKey},
};

use super::{
    Error, kernel_error,
    maps::Pins,
    way::{address, words},
};

/// Local addresses and their pools.
pub struct Locals {
    addresses: Array<MapData, LocalAddress>,
    pools: MapHashMap<MapData, PoolKey, Pool>,
    /// What `addresses` holds, in order.
    known: Vec<IpAddr>,
    indices: HashMap<IpAddr, u32>,
}

impl Locals {
    /// Opens the maps, with what an earlier daemon has left in them.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let addresses: Array<MapData, LocalAddress> = pins.typed("LOCALS")?;
        let mut known = Vec::new();
        for index in 0..addresses.len() {
            let entry = addresses.get(&index, 0).context("the table of local addresses cannot be read")?;
            if entry == LocalAddress::default() {
                break;
            }
            known.push(address(entry.address, true).to_canonical());
        }
        let indices = known.iter().zip(0..).map(|(address, index)| (*address, index)).collect();
        Ok(Self { addresses, pools: pins.typed("POOLS")?, known, indices })
    }

    /// The addresses, by their indices.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.known
    }

    /// Sets the addresses of a pool, those of each family by one write.
    pub fn set_pool(&mut self, service: u32, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut wanted = [(AF_INET, Vec::new()), (AF_INET6, Vec::new())];
        for &address in addresses {
            let index = self.index(address)?;
            wanted[usize::from(address.is_ipv6())].1.push(index as u16);
        }
        for (family, indices) in wanted {
            let key = PoolKey { service, family: family.into() };
            let count = indices.len().min(POOL_SIZE);
            if count == 0 {
                if self.pools.get(&key, 0).is_ok() {
                    let removed = self.pools.remove(&key);
                    removed.map_err(|error| kernel_error("a pool of local addresses cannot be emptied", error))?;
                }
                continue;
            }
            let mut pool = Pool { count: count as u32, addresses: [0; POOL_SIZE] };
            pool.addresses[..count].copy_from_slice(&indices[..count]);
            self.pools.insert(key, pool, 0).map_err(|error| kernel_error("a pool of local addresses cannot be written", error))?;
        }
        Ok(())
    }

    /// Every pool that has addresses.
    pub fn pools(&self) -> Result<Vec<u32>, Error> {
        let keys = self.pools.keys().collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|error| kernel_error("the pools of local addresses cannot be read", error))?;
        Ok(keys.into_iter().map(|key| key.service).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// The index of an address, which may be new.
    fn index(&mut self, address: IpAddr) -> Result<u32, Error> {
        if let Some(index) = self.indices.get(&address) {
            return Ok(*index);
        }
        let index = self.known.len() as u32;
        if index >= self.addresses.len() {
            return Err(Error::Full {
                what: "the table of local addresses that ever were",
                limit: self.addresses.len(),
                advice: "use one of the earlier ones, or start anew after `bpfvs stop --detach`",
            });
        }
        let entry = LocalAddress { address: words(mapped(address)) };
        self.addresses
            .set(index, entry, 0)
            .map_err(|error| kernel_error(format!("the local address {address} cannot be written"), error))?;
        self.known.push(address);
        self.indices.insert(address, index);
        Ok(index)
    }
}

/// An address as one of IPv6.
fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        IpAddr::V6(_) => address,
    }
}
