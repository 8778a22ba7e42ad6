//! The daemon's datapath in this machine's kernel.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::Context;

use super::{
    Instance, Opening, Swept,
    lock::Lock,
    namespace::Identity,
    serve::{Options, serve},
};
use crate::{
    datapath::{self, KernelDatapath, Visit, attach::Attachments, mark_device::MarkDevice, take_over::Place, tell::Told},
    director::model::{FloodView, Hook, InterfaceView, LocalUsage, ReasonView, TableMemory},
    synchronisation::{LeftOut, changes::Changes, message::Entry},
};

/// Runs a daemon until it is told to end.
pub fn run(options: Options) -> anyhow::Result<()> {
    serve::<KernelDatapath>(options)
}

/// Takes away what a daemon of this network namespace left in the kernel when it was killed, and its own files.
pub fn remove_leftovers() -> anyhow::Result<()> {
    // Not under the hands of a daemon that listens somewhere else.
    let _lock = Lock::take().context("cannot take the datapath away")?;
    let identity = Identity::current()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(KernelDatapath::remove(identity.pins()))?;
    super::remove_file(&identity.state_file());
    super::remove_file(&identity.socket());
    Ok(())
}

impl Instance for KernelDatapath {
    fn open(opening: &Opening) -> anyhow::Result<Self> {
        Self::open(&datapath::Options {
            directory: opening.pins.clone(),
            netns_cookie: opening.netns_cookie,
            max_connections: opening.max_connections,
            memory: opening.memory,
            picks_at_once: opening.picks_at_once,
            hook: opening.hook,
            interfaces: opening.interfaces.clone(),
            tcx: Attachments::kernel_has_tcx(),
        })
    }

    async fn remove(pins: &Path) -> anyhow::Result<()> {
        Self::remove(pins).await
    }

    async fn start(&mut self) -> anyhow::Result<()> {
        Self::start(self).await
    }

    async fn shut_down(&mut self) -> anyhow::Result<()> {
        Self::shut_down(self).await
    }

    fn settled(&self) -> impl Future<Output = ()> + Send + use<> {
        Self::settled(self)
    }

    fn changed(&mut self) -> impl Future<Output = ()> + Send + use<> {
        Self::changed(self)
    }

    fn sweep(&self) -> impl Future<Output = anyhow::Result<Swept>> + Send + use<> {
        let outcome = Self::sweep(self);
        async move {
            let outcome = outcome.await?;
            Ok(Swept { left: outcome.examined - outcome.expired, worked: outcome.worked })
        }
    }

    fn attach(&mut self, interface: &str, hook: Hook) -> anyhow::Result<()> {
        Self::attach(self, interface, hook)
    }

    fn detach(&mut self, interface: &str) -> anyhow::Result<()> {
        Self::detach(self, interface)
    }

    fn interfaces(&self) -> Vec<InterfaceView> {
        Self::interfaces(self)
    }

    fn mark_device(&self) -> String {
        match Self::mark_device(self) {
            MarkDevice { present: false, obstacle: None, .. } => "not needed".to_owned(),
            MarkDevice { detour: true, obstacle: None, .. } => {
                "at work; new connections of services by address take the detour over it, too".to_owned()
            }
            MarkDevice { obstacle: None, .. } => "at work".to_owned(),
            MarkDevice { obstacle: Some(obstacle), .. } => obstacle,
        }
    }

    fn listing(&self) -> anyhow::Result<impl FnOnce(Visit<'_>) -> anyhow::Result<()> + Send + use<>> {
        let listing = Self::listing(self)?;
        Ok(|visit: Visit<'_>| listing.show(visit))
    }

    fn local_usage(&self) -> impl Future<Output = anyhow::Result<HashMap<IpAddr, LocalUsage>>> + Send + use<> {
        Self::local_usage(self)
    }

    fn max_connections(&self) -> u32 {
        Self::max_connections(self)
    }

    fn memory(&self) -> TableMemory {
        Self::memory(self)
    }

    fn reasons(&self) -> anyhow::Result<Vec<ReasonView>> {
        Self::reasons(self)
    }

    fn flood(&self) -> anyhow::Result<FloodView> {
        Self::flood(self)
    }

    fn tell(&self, changes: Arc<Mutex<Changes>>) -> impl Future<Output = anyhow::Result<Told>> + Send + use<> {
        Self::tell(self, changes)
    }

    fn take_over(&mut self, entry: &Entry, place: Place) -> Result<(), LeftOut> {
        Self::take_over(self, entry, place)
    }
}
